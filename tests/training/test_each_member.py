"""Members of a stack that are computed together, in turn, or a few at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from small_stacks import batches, compiled, make_stack, run

from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig
from saejax.training.stack import choose_members_at_once
from saejax.training.state import abstract_state, init_state

SIX = dict(seed=(1, 2, 3, 4, 5, 6), auxk=0.03, resample_every=4, resample_from="errors", dead_tokens=60)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_however_many_go_at_once_they_end_alike_in_fp64(kind, one_device):
    with jax.enable_x64(True):
        data = batches(12)
        run_of = lambda mesh, at_once: run(  # noqa: E731
            make_stack(kind, mesh, state_dtype="float64", members_at_once=at_once, **SIX), data
        )
        expected, told = run_of(one_device, 1)
        halves = make_mesh(MeshConfig(member=2, data=4))
        for mesh, at_once in ((one_device, 2), (one_device, 6), (halves, 1), (halves, 3)):
            state, also = run_of(mesh, at_once)
            for a, b in zip(jax.tree.leaves((expected, told)), jax.tree.leaves((state, also)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_those_that_wait_take_no_memory_but_their_own(one_device):
    def temporaries(at_once: int, tokens: int, features: int) -> int:
        shape = dict(seed=tuple(range(8)), batch=tokens, features=features)
        stack = make_stack("standard", one_device, members_at_once=at_once, **shape)
        batch = jax.ShapeDtypeStruct((1, tokens, 16), np.float32, sharding=stack.batch_sharding)
        program = compiled(stack).lower(abstract_state(stack), stack.abstract_hyperparams(), (batch,)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(8, 512, 1024) > 4 * temporaries(1, 512, 1024)
    states = 3 * 2 * 16 * 8192 * 4 * 8  # parameters and two means of each
    assert temporaries(1, 32, 8192) < 0.7 * states, "no second copy (a CPU's compiler makes one of two of six matrices)"


def test_one_in_its_turn_goes_by_its_own_dead_features(one_device):
    """To the bit, for the sums of the short way and of all columns are not in the same order."""
    pair = dict(seed=(1, 2), auxk=0.03, features=512, dead_tokens=10**6)
    first = []
    for dead_of_the_other in (0, 500):
        stack = make_stack("topk", one_device, **pair)
        state = init_state(stack)
        silent_MxF = np.zeros((2, 512), np.int32)
        silent_MxF[0, :20], silent_MxF[1, :dead_of_the_other] = 10**6, 10**6
        state = dataclasses.replace(state, silent_MxF=jax.device_put(silent_MxF, state.silent_MxF.sharding))
        state, _ = run(stack, batches(3), state)
        first.append(jax.tree.map(lambda leaf: np.asarray(leaf[0]), state.params))
    for name, array in first[0].items():
        np.testing.assert_array_equal(array, first[1][name], err_msg=name)


@pytest.mark.parametrize(
    ("asked", "members", "tokens", "features", "shape", "platform", "expected"),
    [
        (0, 36, 4096, 20_480, (4, 2, 1), "gpu", 1),  # 42 million values each
        (0, 36, 1024, 8_192, (4, 2, 1), "gpu", 9),
        (0, 36, 4096, 8_192, (4, 2, 1), "gpu", 3),  # four would fit, but do not divide nine
        (0, 36, 1024, 8_192, (4, 2, 1), "cpu", 1),
        (4, 36, 1024, 8_192, (1, 8, 1), "cpu", 4),
        (5, 36, 1024, 8_192, (1, 8, 1), "cpu", 4),
        (99, 6, 4096, 2**20, (1, 1, 1), "gpu", 6),
        (0, 6, 4096, 2**20, (1, 1, 8), "gpu", 1),
        (0, 1, 1, 1, (1, 1, 1), "gpu", 1),
    ],
)
def test_how_many_go_at_once(asked, members, tokens, features, shape, platform, expected):
    axes = dict(zip(("member", "data", "model"), shape, strict=True))
    assert choose_members_at_once(asked, members, tokens, features, axes, platform) == expected

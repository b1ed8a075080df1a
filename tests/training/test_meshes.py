"""The same training on every mesh, alone or in a stack, however many members are computed at once."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from every_kind import KINDS
from small_stacks import B, D, F, batches, compiled, make_stack, run, train

from saejax.config import Configs
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner.workspace import Run, Stack, Workspace
from saejax.stages.train.run import _fitting_mesh
from saejax.training.stack import choose_members_at_once
from saejax.training.state import abstract_state, init_state

SHAPES = [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 2, 2), (4, 2, 1)]
SWEEP = dict(learning_rate=(3e-3, 1e-3), seed=(1, 2))  # four members
EXTRAS = dict(auxk=0.03, decorrelation=0.01)


@functools.cache
def on_one_device(kind, dtype, one_device):
    return run(make_stack(kind, one_device, state_dtype=dtype, **SWEEP, **EXTRAS), batches(20))[0]


@pytest.mark.parametrize(
    ("kind", "shape", "zero", "dtype"),
    [
        # With True the optimizer is split over tokens.
        ("topk", (2, 2, 2), True, "float64"),
        *(
            pytest.param(kind, shape, False, dtype, marks=pytest.mark.slow)
            for kind in KINDS
            for shape in SHAPES
            for dtype in ("float64", "float32")
        ),
    ],
)
def test_meshes_agree_with_one_device(kind, shape, zero, dtype, one_device):
    with jax.enable_x64(dtype == "float64"):
        expected = on_one_device(kind, dtype, one_device)
        mesh = make_mesh(MeshConfig(**dict(zip(("member", "data", "model"), shape, strict=True))))
        stack = make_stack(kind, mesh, state_dtype=dtype, zero_optimizer=zero, **SWEEP, **EXTRAS)
        state, _ = run(stack, batches(20))
        members, features = 4 // shape[0], F // shape[2]
        for moment in (optax.tree.get(state.optimizer, "mu"), optax.tree.get(state.optimizer, "nu")):
            part = (members, D // (shape[1] if zero else 1), features)
            assert moment["W_enc_DxF"].sharding.shard_shape((4, D, F)) == part
        assert state.params["W_enc_DxF"].sharding.shard_shape((4, D, F)) == (members, D, features)
        for name, value in expected.params.items():
            a, b = np.asarray(value, np.float64), np.asarray(state.params[name], np.float64)
            assert np.linalg.norm(a - b) <= (1e-9 if dtype == "float64" else 1e-4) * np.linalg.norm(a), name


@pytest.mark.parametrize(
    ("shape", "form"), [((2, 2, 2), "transcoder"), pytest.param((1, 1, 8), "sae", marks=pytest.mark.slow)]
)
def test_of_sites_whose_members_wait_a_device_keeps_parts_of_vectors(shape, form, one_device):
    """Each of four members has its own site, and gets whole vectors in its turn alone."""
    kinds = dict(sae="resid_post", transcoder="mlp_in")
    changes = dict(form=form, sites=tuple(f"{kinds[form]}.{layer}" for layer in range(4)), state_dtype="float64")
    with jax.enable_x64(True):
        ends, steps = [], np.random.default_rng(0).normal(size=(5, 4, B, D)).astype(np.float32)
        for mesh in (one_device, make_mesh(MeshConfig(**dict(zip(("member", "data", "model"), shape, strict=True))))):
            stack = make_stack("topk", mesh, **changes, **EXTRAS)
            data = [(step,) if form == "sae" else (step, step[::-1].copy()) for step in steps]
            ends.append(train(stack, data)[0].params)
        part = 4 // shape[0], B // shape[1], D // shape[2]
        assert stack.batch_sharding.shard_shape((4, B, D)) == part
        for name, value in ends[0].items():
            np.testing.assert_allclose(ends[1][name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("sites", "at_once", "shape"),
    # Of one site the matrix is found otherwise than of several.
    [pytest.param(1, 4, (1, 1, 1), marks=pytest.mark.slow), (2, 2, (2, 2, 2))],
    ids=str,
)
def test_members_of_a_site_share_its_values_and_its_whitening_matrix(sites, at_once, shape, one_device):
    """They are on the devices once, and each member is trained as by a run of its own."""

    def whitened(stack):
        scales = [
            dataclasses.replace(scale, metric_DxD=of_site[member.site])
            for member, scale in zip(stack.members, stack.scales)
        ]
        return dataclasses.replace(stack, scales=scales)

    names = tuple(f"resid_post.{layer}" for layer in range(sites))
    of_site = {name: np.random.default_rng(i).normal(size=(D, D)) / 4 for i, name in enumerate(names)}
    data = np.stack([batches(3, seed) for seed in range(sites)], axis=1)  # [steps, sites, B, D]
    with jax.enable_x64(True):
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
        sweep = dict(state_dtype="float64", learning_rate=(3e-3, 1e-3), **EXTRAS)
        seeds = dict(seed=(1, 2)) if sites == 1 else {}
        stack = whitened(make_stack("topk", mesh, sites=names, members_at_once=at_once, **seeds, **sweep))
        assert len(stack.members) == 4 and stack.hyperparams.metric_DxD.shape == (sites, D, D)
        together, _ = train(stack, zip(data, strict=True))
        first = None
        for index, member in enumerate(stack.members):
            changes = sweep | dict(learning_rate=(member.settings["learning_rate"],), seed=(member.settings["seed"],))
            alone = whitened(make_stack("topk", one_device, sites=(member.site,), **changes))
            first = first or alone
            start = jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], init_state(stack))
            start = jax.device_put(jax.tree.map(np.asarray, start), one_device.devices.item())
            state, _ = run(alone, data[:, names.index(member.site)], start, like=first)
            for name, value in state.params.items():
                np.testing.assert_allclose(together.params[name][index], value[0], rtol=1e-8, atol=1e-11, err_msg=name)


# TopK must find the largest over all features; test_planted_crosscoders.py and test_widths.py have BatchTopK on meshes.
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "topk" else pytest.mark.slow) for k in KINDS])
def test_a_stack_of_four_equals_four_single_runs(kind, one_device):
    with jax.enable_x64(True):
        together = on_one_device(kind, "float64", one_device)
        pairs = [(rate, seed) for rate in SWEEP["learning_rate"] for seed in SWEEP["seed"]]
        single = functools.partial(make_stack, kind, one_device, state_dtype="float64", **EXTRAS)
        stacks = [single(learning_rate=(rate,), seed=(seed,)) for rate, seed in pairs]
        for index, alone in enumerate(stacks):
            state, _ = run(alone, batches(20), like=stacks[0])
            for name, value in state.params.items():
                np.testing.assert_allclose(
                    together.params[name][index], value[0], rtol=1e-9, atol=1e-12, err_msg=f"{name} of member {index}"
                )


@pytest.mark.parametrize(
    ("together", "members", "shape"),
    [
        (6, 6, (4, 2, 1)),  # all of them: that 4 does not divide 6 is refused later
        (6, 3, (4, 2, 1)),  # all of them, in two expansions
        (2, 2, (2, 4, 1)),
        (1, 1, (1, 8, 1)),
    ],
)
def test_members_that_are_left_are_trained_on_a_mesh_that_divides_them(tmp_path, together, members, shape):
    names = [f"k{k}" for k in range(6)]
    stack = Stack(Workspace(tmp_path), "train/topk", "", dict.fromkeys(names, ""))
    stack.together = stack.missing = names[:together]
    run = Run("train", "topk", tmp_path, Configs(MeshConfig(member=4, data=2)), {}, stack=stack)
    assert tuple(_fitting_mesh(run, members).shape.values()) == shape


EIGHT = dict(seed=tuple(range(8)), auxk=0.03, resample_every=4, resample_from="errors", dead_tokens=60)


@pytest.mark.slow  # some at once are compared with each alone above, and resampling on a mesh in test_resampling.py
def test_however_many_go_at_once_they_end_alike_in_fp64(one_device):
    with jax.enable_x64(True):
        halves, ends = make_mesh(MeshConfig(member=2, data=4)), []
        # All in one program, and some of a device at once; one in its turn, as alone, is tested above.
        for mesh, at_once in ((one_device, 8), (halves, 2)):
            stack = make_stack("topk", mesh, state_dtype="float64", members_at_once=at_once, **EIGHT)
            ends.append(jax.tree.leaves(run(stack, batches(9))))
        for expected, leaf in zip(*ends, strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
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
    for dead_of_second in (0, 500):
        stack = make_stack("topk", one_device, **pair)
        state = init_state(stack)
        silent_MxF = np.zeros((2, 512), np.int32)
        silent_MxF[0, :20], silent_MxF[1, :dead_of_second] = 10**6, 10**6
        state = dataclasses.replace(state, silent_MxF=jax.device_put(silent_MxF, state.silent_MxF.sharding))
        state, _ = run(stack, batches(3), state)
        first.append(jax.tree.map(lambda leaf: np.asarray(leaf[0]), state.params))
    for name, array in first[0].items():
        np.testing.assert_array_equal(array, first[1][name], err_msg=name)


@pytest.mark.parametrize(
    ("setting", "members", "tokens", "features", "shape", "platform", "expected"),
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
def test_how_many_go_at_once(setting, members, tokens, features, shape, platform, expected):
    axes = dict(zip(("member", "data", "model"), shape, strict=True))
    assert choose_members_at_once(setting, members, tokens, features, axes, platform) == expected

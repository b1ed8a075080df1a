"""The same training on every mesh: one device, eight devices in five shapes, alone or in a stack."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from every_kind import KINDS, MADE_UP
from small_stacks import STEPS, D, F, batches, make_stack, run, step

from saejax.parallel.mesh import make_mesh
from saejax.runner.config import Configs
from saejax.runner.workspace import Run, StackWork
from saejax.settings import MeshConfig
from saejax.training.state import init_state
from saejax.training.train import _fitting_mesh

SHAPES = [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 2, 2), (4, 2, 1)]
# One kind that shards its features freely and two that must find the largest over all of them; the others take minutes.
FEW_KINDS = [
    kind if kind in ("standard", "topk", "batchtopk", MADE_UP) else pytest.param(kind, marks=pytest.mark.slow)
    for kind in KINDS
]
SWEEP = dict(learning_rate=(3e-3, 1e-3), seed=(1, 2))  # four members
EXTRAS = dict(auxk=0.03, decorrelation=0.01)


@functools.cache
def on_one_device(kind, dtype, one_device):
    return run(make_stack(kind, one_device, state_dtype=dtype, **SWEEP, **EXTRAS), batches())[0]


def check(kind, shape, dtype, tolerance, one_device, zero=False):
    with jax.enable_x64(dtype == "float64"):
        expected = on_one_device(kind, dtype, one_device)
        mesh = make_mesh(MeshConfig(**dict(zip(("member", "data", "model"), shape, strict=True))))
        stack = make_stack(kind, mesh, state_dtype=dtype, zero_optimizer=zero, **SWEEP, **EXTRAS)
        state, _ = run(stack, batches())
        moments = optax.tree.get(state.optimizer, "mu"), optax.tree.get(state.optimizer, "nu")
        for moment in moments:
            part = (4 // shape[0], D // (shape[1] if zero else 1), F // shape[2])
            assert moment["W_enc_DxF"].sharding.shard_shape((4, D, F)) == part
        shard = state.params["W_enc_DxF"].sharding.shard_shape((4, D, F))
        assert shard == (4 // shape[0], D, F // shape[2])
        for name, value in expected.params.items():
            a, b = np.asarray(value, np.float64), np.asarray(state.params[name], np.float64)
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a), name


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_a_mesh_of_all_axes_agrees_in_fp64(kind, one_device):
    check(kind, (2, 2, 2), "float64", 1e-9, one_device)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_an_optimizer_that_is_split_over_tokens_too_moves_parameters_alike(shape, one_device):
    check("topk", shape, "float64", 1e-9, one_device, zero=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_five_meshes_agree(kind, shape, one_device):
    check(kind, shape, "float64", 1e-9, one_device)
    check(kind, shape, "float32", 1e-4, one_device)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_a_stack_of_four_equals_four_single_runs(kind, one_device):
    with jax.enable_x64(True):
        together = on_one_device(kind, "float64", one_device)
        pairs = [(rate, seed) for rate in SWEEP["learning_rate"] for seed in SWEEP["seed"]]
        for index, (rate, seed) in enumerate(pairs):
            alone = make_stack(kind, one_device, state_dtype="float64", learning_rate=(rate,), seed=(seed,), **EXTRAS)
            state, _ = run(alone, batches())
            for name, value in state.params.items():
                np.testing.assert_allclose(
                    together.params[name][index], value[0], rtol=1e-9, atol=1e-12, err_msg=f"{name} of member {index}"
                )
    assert STEPS == 50


def test_layers_of_a_stack_train_on_their_own_values(one_device):
    """Members with their own sites, split over `member`: each equals a single run on its site."""
    stack = make_stack(mesh=make_mesh(MeshConfig(member=4, data=2)), sites=tuple(f"resid_post.{i}" for i in range(4)))
    data = np.stack([batches(6, seed) for seed in range(4)], axis=1)  # [steps, sites, B, D]
    state = init_state(stack)
    start = jax.tree.map(np.asarray, state.params)  # other directions at each site
    for batch in data:
        state, metrics = step(stack, state, (batch,))
        jax.block_until_ready(metrics)
    for index in range(4):
        single = make_stack(mesh=one_device)
        own = {name: jax.device_put(value[index : index + 1]) for name, value in start.items()}
        alone, _ = run(single, data[:, index], dataclasses.replace(init_state(single), params=own))
        for name, value in alone.params.items():
            np.testing.assert_allclose(state.params[name][index], value[0], rtol=1e-4, atol=1e-5)


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
    stack = StackWork({name: tmp_path / name for name in names}, names[:together], names[:together])
    run = Run("train", "topk", tmp_path, Configs(MeshConfig(member=4, data=2)), {}, stack=stack)
    assert tuple(_fitting_mesh(run, members).shape.values()) == shape

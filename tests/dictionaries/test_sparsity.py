"""Sparsity functions against XLA's own top-k and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import selection, sparsity
from saejax.parallel.mesh import make_mesh, sharding
from saejax.parallel.settings import MeshConfig


def reference_topk(pre: np.ndarray, k: int) -> np.ndarray:
    acts = np.maximum(pre, 0)
    kept = np.zeros_like(acts)
    for row, out in zip(acts, kept):
        chosen = np.argsort(-row, kind="stable")[:k]
        out[chosen] = row[chosen]
    return kept


SMALL = [1e-40, 1e-38, 1e-30, 1e30, 3e38, 2.0, 1.0, -1e30]  # denormal, tiny and huge


@pytest.mark.parametrize("features,k", [(64, 1), (64, 7), (512, 8), (512, 32), (96, 96), (33, 5), (1, 1)])
def test_topk_keeps_exactly_the_largest(features, k):
    pre = np.random.default_rng(features + k).normal(size=(50, features)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(sparsity.topk, static_argnums=1)(pre, k), reference_topk(pre, k))
    grad = jax.grad(lambda pre: jnp.sum(sparsity.topk(pre, k) * 3.0))(jnp.asarray(pre))
    np.testing.assert_array_equal(grad, 3.0 * (reference_topk(pre, k) > 0))  # it reaches kept features only


@pytest.mark.parametrize(
    "values", [[-1.0, -2, -3, -4], [0.0, 0, 0, 0], [5.0, -1, -1, -1], [1.0, 1, 1, 1], [np.inf, 1, 2, 3], SMALL]
)
def test_topk_of_odd_rows(values):
    acts = np.asarray(sparsity.topk(jnp.array([values], jnp.float32), 2))[0]
    positive = np.maximum(np.array(values, np.float32), 0)
    if len(set(values)) == 1:  # ties with the k-th largest are all kept
        np.testing.assert_array_equal(acts, positive)
    else:
        np.testing.assert_array_equal(acts, reference_topk(positive[None], 2)[0])


def test_more_values_than_a_number_of_32_bits_counts_are_many(monkeypatch):
    monkeypatch.setattr(selection, "_count_each", lambda acts, threshold: jnp.full((len(acts), 1), 2**24, jnp.int32))
    for tokens, expected in ((3, 3 * 2**24), (2**7, 2**30), (2**8, 2**30)):
        acts_BxF = np.broadcast_to(np.float32(0), (tokens, 2**24))  # without the memory of so many
        assert selection._count_all(acts_BxF, jnp.zeros((1, 1))) == expected


@pytest.mark.parametrize("platform", ["tpu", "default"])
def test_both_ways_to_find_the_largest_blocks(platform, monkeypatch):
    """A TPU looks at all blocks, others at the best ones; k may be a traced number below the largest there can be."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, **ways: ways.get(platform, ways["default"])(*arrays)
    )
    tokens = dict(tpu=40, default=41)[platform]  # what is traced for one is not there for the other
    normal = np.random.default_rng(3).normal(size=(tokens, 640)).astype(np.float32)
    keep_largest = jax.jit(lambda pre, k: sparsity.topk(pre, k, 9))
    for values, pre in dict(normal=normal, ties=np.round(normal * 4), few=normal - 2.5).items():
        positive = np.maximum(pre, 0)
        kth = np.sort(positive, axis=1)[:, [-6]]
        expected = np.where(positive >= kth, positive, 0)
        np.testing.assert_array_equal(keep_largest(pre, jnp.int32(6)), expected, err_msg=values)


@pytest.mark.parametrize("kind", ["normal", "ties", "large first", "large where sampled", "few positive", "equal"])
@pytest.mark.parametrize("tokens,features,k", [(50, 64, 3), (50, 33, 5), (50, 640, 9), (50, 64, 64), (515, 64, 5)])
def test_batch_topk_keeps_the_largest_of_all_tokens(tokens, features, k, kind):
    """Of few tokens, and of many, which are sampled first."""
    pre = np.random.default_rng(features).normal(size=(tokens, features)).astype(np.float32)
    if kind in ("ties", "large first"):
        pre[:5] += 3  # tokens that take more than their share
    if kind == "ties":
        pre = np.round(pre * 4)
    elif kind == "few positive":
        pre -= 3
    elif kind == "equal":
        pre[:] = 0.7
    elif kind == "large where sampled":
        pre[:: selection._SAMPLED] *= 100
    acts = jax.jit(sparsity.batch_topk, static_argnums=1)(pre, k)
    positive = np.maximum(pre, 0)
    kth = np.sort(positive.ravel())[-tokens * k]
    np.testing.assert_array_equal(acts, np.where(positive >= kth, positive, 0))
    level_F = jnp.full(features, sparsity.lowest_level(acts, pre))
    np.testing.assert_array_equal(sparsity.threshold(pre, level_F), acts)


def test_what_lies_at_the_threshold():
    pre = jnp.array([[1.0, 2.0, -3.0, 2.0]])
    np.testing.assert_array_equal(sparsity.threshold(pre, jnp.full(4, 2.0)), np.zeros((1, 4)))
    np.testing.assert_array_equal(sparsity.signed_topk(pre, 2, 3), [[0.0, 2.0, 0.0, 2.0]])


@pytest.mark.parametrize("features", [33, 640])
def test_nan_stays_nan(features):
    """In a row of its own, as an input that is NaN has it; other rows are as ever."""
    pre, rows = np.random.default_rng(2).normal(size=(9, features)).astype(np.float32), np.arange(9) != 4
    damaged, level = np.where(rows[:, None], pre, np.float32(np.nan)), np.full(features, 0.5, np.float32)
    for function in (
        lambda pre: sparsity.topk(pre, 4),
        lambda pre: sparsity.signed_topk(pre, 4, 4),
        lambda pre: sparsity.threshold(pre, level),
        lambda pre: sparsity.jumprelu(pre, level, 0.1),
        lambda pre: sparsity.gated(pre, pre),
    ):
        found = np.asarray(jax.jit(function)(damaged))
        assert np.isnan(found[4]).all()
        np.testing.assert_array_equal(found[rows], np.asarray(function(pre))[rows])
    assert np.isnan(sparsity.batch_topk(jnp.asarray(damaged), 4)[4]).all()


def test_topk_in_bfloat16_and_float64():
    pre = np.random.default_rng(0).permutation(256).reshape(2, 128).astype(np.float32) - 60
    low = sparsity.topk(jnp.asarray(pre, jnp.bfloat16), 5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(low, np.float32), reference_topk(pre, 5))
    with jax.enable_x64(True):
        wide = 1 + np.arange(64)[None] * 1e-15  # told apart in float64 only
        np.testing.assert_array_equal(np.asarray(sparsity.topk(jnp.asarray(wide), 3)), reference_topk(wide, 3))


def test_topk_over_a_sharded_feature_axis():
    mesh = make_mesh(MeshConfig(data=2, model=4))
    pre = np.random.default_rng(2).normal(size=(16, 512)).astype(np.float32)
    placed = jax.device_put(pre, sharding(mesh, "data", "model"))
    acts = jax.jit(sparsity.topk, static_argnums=1)(placed, 9)
    np.testing.assert_array_equal(np.asarray(acts), reference_topk(pre, 9))
    assert acts.sharding.is_equivalent_to(placed.sharding, 2)


def test_on_a_cpu_xla_does_not_sort_to_find_the_largest_blocks():
    acts = jnp.zeros((8, 1024))
    program = jax.jit(lambda acts: selection.kth_largest_below(acts, 8)).lower(acts).compile().as_text()
    assert "TopK" in program and " sort(" not in program, "a sort takes four times as long"

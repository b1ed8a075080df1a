"""The sparse form of TopK codes gives what the dense form gives, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import sparse_products, sparsity
from saejax.dictionaries.matmul import matmul
from saejax.parallel import make_mesh

# Tokens, width, features, k: one token; k = F; blocks that do not divide F; a usual shape; more tokens than a batch.
SHAPES = [(1, 5, 48, 2), (7, 6, 20, 20), (9, 8, 100, 3), (33, 16, 256, 4), (50, 3, 64, 1)]
NAMES = ("x", "centre", "W_enc", "b_enc", "W_dec")


@pytest.fixture(params=SHAPES, ids=str)
def world(request):
    """Arrays by name, and k; feature 0 never fires."""
    tokens, width, features, k = request.param
    rng = np.random.default_rng(list(request.param))
    shapes = dict(
        zip(NAMES, [(tokens, width), (width,), (width, features), (features,), (features, width)], strict=True)
    )
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["b_enc"][0] = -1e3
    return arrays, k


def sparse_form(arrays, k, most, moves_pre=True):
    code, pre = sparse_products.encode(*(arrays[name] for name in NAMES[:4]), k, most, "float32", moves_pre)
    return code.dense(), pre, sparse_products.product(code, arrays["W_dec"]), code.firings()


def dense_form(arrays, k, most):
    pre = matmul(arrays["x"] - arrays["centre"][None], arrays["W_enc"]) + arrays["b_enc"][None]
    f = sparsity.topk(pre, k, most)
    return f, pre, matmul(f, arrays["W_dec"]), (f > 0).sum(axis=0)


def gradients(form, arrays, weights):
    def loss(arrays):
        return sum((weight * jnp.tanh(part)).sum() for weight, part in zip(weights, form(arrays)[:3], strict=True))

    return jax.jit(jax.grad(loss))(arrays)


@pytest.mark.parametrize("moves_pre", [True, False])
def test_equal_to_the_dense_form(world, moves_pre):
    arrays, most = world
    k = max(most - 1, 1)
    found = jax.jit(lambda arrays, k: sparse_form(arrays, k, most))(arrays, k)
    wanted = dense_form(arrays, k, most)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert (np.asarray(found[0]) > 0).sum(axis=1).max() == min(k, (np.asarray(wanted[1]) > 0).sum(axis=1).max())
    assert found[3][0] == 0
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(part.shape).astype(np.float32) for part in wanted[:3]]
    weights[1] *= moves_pre
    own = gradients(lambda arrays: sparse_form(arrays, k, most, moves_pre), arrays, weights)
    dense = gradients(lambda arrays: dense_form(arrays, k, most), arrays, weights)
    for name in NAMES:
        scale = np.abs(dense[name]).max()
        assert scale > 0
        np.testing.assert_allclose(own[name], dense[name], atol=1e-5 * scale, rtol=1e-5, err_msg=name)
    if not moves_pre:
        assert not np.asarray(own["W_dec"])[0].any() and not np.asarray(own["W_enc"])[:, 0].any()


def test_of_equals_the_first_are_kept():
    arrays = dict(x=np.ones((2, 1)), centre=np.zeros(1), W_enc=np.array([[1, 3, 2, 2, 2, 0, -1]]), b_enc=np.zeros(7))
    code, _ = sparse_products.encode(*(jnp.asarray(array, jnp.float32) for array in arrays.values()), 3, 4)
    np.testing.assert_array_equal(code.dense(), np.tile([[0, 3, 2, 2, 0, 0, 0]], (2, 1)))
    rng = np.random.default_rng(0)
    values = rng.integers(-3, 4, (20, 320)).astype(np.float32)  # blocks, and ties everywhere
    for k in (1, 5, 19, 20, 320):
        for one, other in zip(sparsity.largest(jnp.asarray(values), k), jax.lax.top_k(values, k), strict=True):
            np.testing.assert_array_equal(one, other)


def test_entries_are_sorted_alike_without_room_for_one_number(monkeypatch):
    rng = np.random.default_rng(0)
    feature_BxK = jnp.asarray(np.argsort(rng.random((40, 9)), axis=1)[:, :3], jnp.int32)
    packed = sparse_products.ByFeature.of(feature_BxK, 9)
    monkeypatch.setattr(sparse_products, "_PACKED", 1)
    plain = sparse_products.ByFeature.of(feature_BxK, 9)
    np.testing.assert_array_equal(packed.order_N, np.argsort(np.asarray(feature_BxK).ravel(), kind="stable"))
    np.testing.assert_array_equal(packed.order_N, plain.order_N)


def test_it_is_taken_on_one_cpu_device_where_few_features_are_active(one_device):
    assert sparse_products.wins(one_device, "float32", 4608, 128)
    assert not sparse_products.wins(one_device, "bfloat16", 4608, 128)
    assert not sparse_products.wins(one_device, "float32", 4608, 512)
    assert not sparse_products.wins(make_mesh(), "float32", 4608, 32)  # eight devices

"""The sparse form of TopK codes gives what the dense form gives, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import selection, sparse_products, sparsity
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparse_products import Encoder
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh

# Tokens, width, features, k: one token; k = F; blocks that do not divide F; a usual shape; more tokens than a batch.
SHAPES = [(1, 5, 48, 2), (7, 6, 20, 20), (9, 8, 100, 3), (33, 16, 256, 4), (50, 3, 64, 1)]
NAMES = ("x", "centre", "W_enc", "b_enc", "W_dec", "y")


@pytest.fixture
def world(request):
    """Arrays by name, and k; feature 0 never fires."""
    tokens, width, features, k = request.param
    rng = np.random.default_rng(list(request.param))
    shapes = [(tokens, width), (width,), (width, features), (features,), (features, width), (tokens, width)]
    arrays = {name: rng.standard_normal(size).astype(np.float32) for name, size in zip(NAMES, shapes, strict=True)}
    arrays["b_enc"][0] = -1e3
    return arrays, k


def sparse_form(arrays, k, most, any_dead=True, field="pre_for_auxk_BxF"):
    """Activations, pre-activations (those for AuxK, or for a kind's losses), residuals and firings."""
    encoder = Encoder(*(arrays[name] for name in NAMES[1:4]))
    explained = sparse_products.explain(
        arrays["x"], arrays["y"], encoder, arrays["W_dec"], k, most, "float32", any_dead
    )
    return explained.code.dense(), getattr(explained, field), explained.residual_BxO, explained.code.firings()


def dense_form(arrays, k, most):
    pre = matmul(arrays["x"] - arrays["centre"][None], arrays["W_enc"]) + arrays["b_enc"][None]
    f = sparsity.topk(pre, k, most)
    return f, pre, arrays["y"] - matmul(f, arrays["W_dec"]), (f > 0).sum(axis=0)


def gradients(form, arrays, weights):
    def loss(arrays):
        return sum((weight * jnp.tanh(part)).sum() for weight, part in zip(weights, form(arrays)[:3], strict=True))

    return jax.jit(jax.grad(loss))(arrays)


CASES = [
    ("pre_for_auxk_BxF", True, True),
    ("pre_for_auxk_BxF", False, False),  # while no feature is dead, AuxK's gradient is 0
    ("pre_BxF", True, True),
    ("pre_BxF", False, True),  # a kind's losses get theirs whatever features are dead
    ("pre_BxF", False, False),
]


@pytest.mark.parametrize(
    ("world", "field", "any_dead", "moves_pre"),
    [
        pytest.param(shape, *case, marks=() if shape == SHAPES[2] or case == CASES[0] else pytest.mark.slow)
        for shape in SHAPES
        for case in CASES
    ],
    indirect=["world"],
    ids=str,
)
def test_equal_to_the_dense_form(world, field, any_dead, moves_pre):
    arrays, most = world
    k = max(most - 1, 1)
    sparse_values = jax.jit(lambda arrays, k: sparse_form(arrays, k, most))(arrays, k)
    dense_values = dense_form(arrays, k, most)
    for sparse_value, dense_value in zip(sparse_values, dense_values, strict=True):
        np.testing.assert_allclose(sparse_value, dense_value, rtol=1e-5, atol=1e-5)
    kept, positive = ((np.asarray(value) > 0).sum(axis=1).max() for value in (sparse_values[0], dense_values[1]))
    assert kept == min(k, positive)
    assert sparse_values[3][0] == 0
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(part.shape).astype(np.float32) for part in dense_values[:3]]
    weights[1] *= moves_pre
    own = gradients(lambda arrays: sparse_form(arrays, k, most, any_dead, field), arrays, weights)
    dense = gradients(lambda arrays: dense_form(arrays, k, most), arrays, weights)
    for name in NAMES:
        scale = np.abs(dense[name]).max()
        assert scale > 0
        np.testing.assert_allclose(own[name], dense[name], atol=1e-5 * scale, rtol=1e-5, err_msg=name)
    if not moves_pre:
        assert not np.asarray(own["W_dec"])[0].any() and not np.asarray(own["W_enc"])[:, 0].any()


def test_of_equals_the_first_are_kept():
    arrays = dict(x=np.ones((2, 1)), centre=np.zeros(1), W_enc=np.array([[1, 3, 2, 2, 2, 0, -1]]), b_enc=np.zeros(7))
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    arrays |= dict(W_dec=jnp.arange(7.0)[:, None], y=jnp.ones((2, 1)))
    f, _, error, firings = sparse_form(arrays, 3, 4)
    np.testing.assert_array_equal(f, np.tile([[0, 3, 2, 2, 0, 0, 0]], (2, 1)))
    np.testing.assert_array_equal(error, np.full((2, 1), 1 - (3 + 4 + 6)))
    np.testing.assert_array_equal(firings, [0, 2, 2, 2, 0, 0, 0])


def test_entries_are_sorted_alike_without_room_for_one_number(monkeypatch):
    rng = np.random.default_rng(0)
    feature_BxK = jnp.asarray(np.argsort(rng.random((40, 9)), axis=1)[:, :3], jnp.int32)
    packed = sparse_products.FeatureOrder.of(feature_BxK, 9)
    monkeypatch.setattr(sparse_products, "_PACKED", 1)
    plain = sparse_products.FeatureOrder.of(feature_BxK, 9)
    np.testing.assert_array_equal(packed.order_N, np.argsort(np.asarray(feature_BxK).ravel(), kind="stable"))
    np.testing.assert_array_equal(packed.order_N, plain.order_N)


def test_the_largest_of_each_row():
    rng = np.random.default_rng(0)
    for values in (
        rng.integers(-3, 4, (20, 320)),
        rng.standard_normal((1, 50)),
        np.full((3, 320), -1.0),
        np.zeros((2, 7)),
    ):
        values = values.astype(np.float32)  # ties everywhere, and rows without anything to keep
        for k in {1, 20, values.shape[1]}:
            most = min(k + 3, values.shape[1])
            find = jax.jit(selection.k_largest, static_argnums=2)
            value_BxK, place_BxK = find(jnp.asarray(values), jnp.int32(min(k, most)), most)
            assert place_BxK.dtype == jnp.int32 and value_BxK.shape == (len(values), most)
            for row, kept, places in zip(values, np.asarray(value_BxK), np.asarray(place_BxK), strict=True):
                order = [at for at in np.argsort(-row, kind="stable")[:k] if row[at] > 0]
                assert sorted(places[kept > 0]) == sorted(order)
                np.testing.assert_array_equal(kept[kept > 0], row[places[kept > 0]])


def test_the_form_that_is_taken(one_device):
    def form(asked, mesh, matmul_dtype="float32", k=32):
        return sparse_products.choose_form(asked, mesh, matmul_dtype, 4608, k)

    eight = make_mesh()
    assert form("auto", one_device, k=128) == "rows"
    assert form("auto", one_device, "bfloat16", 128) == form("auto", one_device, k=512) == "dense"
    assert form("auto", eight) == "dense"
    assert form("rows", one_device) == "rows" and form("dense", eight) == "dense"
    with pytest.raises(UserError, match="products=rows is for one .* there are 8 of platform cpu"):
        form("rows", eight)

"""The sparse form of TopK codes gives what the dense form gives, forwards and backwards."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from saejax.dictionaries import codes, selection, sparse_kernels, sparse_products, sparsity
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparse_products import Encoder, Products
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh

# Tokens, width, features, k: one token; k = F; blocks that do not divide F; a usual shape; more tokens than a batch.
SHAPES = [(1, 5, 48, 2), (7, 6, 20, 20), (9, 8, 100, 3), (33, 16, 256, 4), (50, 3, 64, 1)]
NAMES = ("x", "centre", "W_enc", "b_enc", "W_dec", "y")
FORMS = ("rows", "kernels")


@pytest.fixture(params=SHAPES, ids=str)
def world(request):
    """Arrays by name, and k; feature 0 never fires."""
    tokens, width, features, k = request.param
    rng = np.random.default_rng(list(request.param))
    shapes = dict(
        zip(
            NAMES,
            [(tokens, width), (width,), (width, features), (features,), (features, width), (tokens, width)],
            strict=True,
        )
    )
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["b_enc"][0] = -1e3
    return arrays, k


def sparse_form(form, arrays, k, most, moves_pre=True):
    encoder = Encoder(*(arrays[name] for name in NAMES[1:4]))
    plan = Products(most, "float32", form)
    found = sparse_products.explain(arrays["x"], arrays["y"], encoder, arrays["W_dec"], k, plan, moves_pre)
    return found.code.dense(), found.pre_BxF, found.error_BxD, found.code.firings()


def dense_form(arrays, k, most):
    pre = matmul(arrays["x"] - arrays["centre"][None], arrays["W_enc"]) + arrays["b_enc"][None]
    f = sparsity.topk(pre, k, most)
    return f, pre, arrays["y"] - matmul(f, arrays["W_dec"]), (f > 0).sum(axis=0)


def gradients(form, arrays, weights):
    def loss(arrays):
        return sum((weight * jnp.tanh(part)).sum() for weight, part in zip(weights, form(arrays)[:3], strict=True))

    return jax.jit(jax.grad(loss))(arrays)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moves_pre", [True, False])
def test_equal_to_the_dense_form(world, form, moves_pre):
    arrays, most = world
    k = max(most - 1, 1)
    found = jax.jit(lambda arrays, k: sparse_form(form, arrays, k, most))(arrays, k)
    wanted = dense_form(arrays, k, most)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert (np.asarray(found[0]) > 0).sum(axis=1).max() == min(k, (np.asarray(wanted[1]) > 0).sum(axis=1).max())
    assert found[3][0] == 0
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(part.shape).astype(np.float32) for part in wanted[:3]]
    weights[1] *= moves_pre
    own = gradients(lambda arrays: sparse_form(form, arrays, k, most, moves_pre), arrays, weights)
    dense = gradients(lambda arrays: dense_form(arrays, k, most), arrays, weights)
    for name in NAMES:
        scale = np.abs(dense[name]).max()
        assert scale > 0
        np.testing.assert_allclose(own[name], dense[name], atol=1e-5 * scale, rtol=1e-5, err_msg=name)
    if not moves_pre:
        assert not np.asarray(own["W_dec"])[0].any() and not np.asarray(own["W_enc"])[:, 0].any()


def test_kernels_multiply_rounded_rows_in_full_precision():
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(SHAPE).astype(np.float32) for name, SHAPE in (("W", (40, 300)), ("y", (6, 300)))
    }
    rows = rng.integers(0, 40, (6, 20)).astype(np.int32)
    rounded = np.asarray(arrays["W"].astype(jnp.bfloat16), np.float64)
    found = sparse_kernels.row_products(rows, arrays["W"].astype(jnp.bfloat16), arrays["y"])
    np.testing.assert_allclose(found, np.einsum("bkd,bd->bk", rounded[rows], arrays["y"]), rtol=1e-4, atol=1e-4)
    starts = np.array([0, 0, 17, 80, 120], np.int32)  # a feature that never fires, and more than are gathered at once
    terms = [(rng.standard_normal(120).astype(np.float32), arrays["W"].astype(jnp.bfloat16)) for _ in range(2)]
    base = rng.standard_normal((4, 300)).astype(np.float32)
    for at, sums in enumerate(sparse_kernels.segment_sums(starts, rows.reshape(-1), terms, base)):
        products = terms[at][0][:, None] * rounded[rows.reshape(-1)]
        wanted = np.stack([products[a:b].sum(0) for a, b in itertools.pairwise(starts)])
        np.testing.assert_allclose(sums, wanted + base * (at == 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [(9, 8, 100, 3)], indirect=True, ids=str)
def test_kernels_of_members_side_by_side_and_for_a_gpu(world):
    """On a GPU a stack's members are vectorised."""
    arrays, most = world

    def gradient(arrays):
        return jax.grad(lambda arrays: sum(jnp.sin(p).sum() for p in sparse_form("kernels", arrays, most, most)[:3]))(
            arrays
        )

    pair = {name: np.stack([array, array[..., ::-1]]) for name, array in arrays.items()}
    together = jax.jit(jax.vmap(gradient))
    for name, found in together(pair).items():
        for index in range(2):
            alone = jax.jit(gradient)({key: array[index] for key, array in pair.items()})[name]
            np.testing.assert_allclose(found[index], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max(), err_msg=name)
    gpu = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):  # JAX 0.11 asks which GPU it is for
        lowered = together.trace(pair).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("xla.gpu.triton") >= 3  # decoding with error, both weight gradients, the gradient of values


@pytest.mark.parametrize("form", FORMS)
def test_of_equals_the_first_are_kept(form):
    arrays = dict(x=np.ones((2, 1)), centre=np.zeros(1), W_enc=np.array([[1, 3, 2, 2, 2, 0, -1]]), b_enc=np.zeros(7))
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    arrays |= dict(W_dec=jnp.arange(7.0)[:, None], y=jnp.ones((2, 1)))
    f, _, error, firings = sparse_form(form, arrays, 3, 4)
    np.testing.assert_array_equal(f, np.tile([[0, 3, 2, 2, 0, 0, 0]], (2, 1)))
    np.testing.assert_array_equal(error, np.full((2, 1), 1 - (3 + 4 + 6)))
    np.testing.assert_array_equal(firings, [0, 2, 2, 2, 0, 0, 0])


def test_entries_are_sorted_alike_without_room_for_one_number(monkeypatch):
    rng = np.random.default_rng(0)
    feature_BxK = jnp.asarray(np.argsort(rng.random((40, 9)), axis=1)[:, :3], jnp.int32)
    packed = codes.ByFeature.of(feature_BxK, 9)
    monkeypatch.setattr(codes, "_PACKED", 1)
    plain = codes.ByFeature.of(feature_BxK, 9)
    np.testing.assert_array_equal(packed.order_N, np.argsort(np.asarray(feature_BxK).ravel(), kind="stable"))
    np.testing.assert_array_equal(packed.order_N, plain.order_N)


@pytest.mark.parametrize("choose", [selection._largest_by_sorting, selection._largest_by_searching])
def test_the_largest_of_each_row(choose):
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
            value_BxK, place_BxK = jax.jit(choose, static_argnums=2)(jnp.asarray(values), jnp.int32(min(k, most)), most)
            assert place_BxK.dtype == jnp.int32 and value_BxK.shape == (len(values), most)
            for row, kept, places in zip(values, np.asarray(value_BxK), np.asarray(place_BxK), strict=True):
                order = [at for at in np.argsort(-row, kind="stable")[:k] if row[at] > 0]
                assert sorted(places[kept > 0]) == sorted(order)
                np.testing.assert_array_equal(kept[kept > 0], row[places[kept > 0]])


def test_the_form_that_is_taken(one_device):
    def form(asked, mesh, matmul_dtype="float32", k=32):
        return sparse_products.chosen_form(asked, mesh, matmul_dtype, 4608, k)

    eight = make_mesh()
    assert form("auto", one_device, k=128) == "rows"
    assert (
        form("auto", one_device, "bfloat16", 128) == form("auto", one_device, k=512) == form("auto", eight) == "dense"
    )
    assert form("kernels", one_device) == "kernels" and form("dense", eight) == "dense"
    for asked in ("rows", "kernels"):
        with pytest.raises(UserError, match=f"products={asked} is for one .* there are 8 of platform cpu"):
            form(asked, eight)

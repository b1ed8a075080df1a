"""Dictionaries: formulas against numpy, gradients against finite differences, files, edits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from saejax.dictionaries import Dictionary, DictionaryConfig, formats, kinds, load_dictionary, losses, save_dictionary
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError
from saejax.models.edits import ForwardPass


def make(kind="topk", d_in=12, n_features=40, k=4, max_norm=1e9, dtype="float32") -> Dictionary:
    config = DictionaryConfig(kind=kind, site="resid_post.1", d_in=d_in, n_features=n_features, k=k, max_norm=max_norm)
    dictionary = Dictionary.initial(config, jax.random.key(3), dtype=dtype)
    rng = np.random.default_rng(4)
    dictionary.b_enc_F[...] = jnp.asarray(rng.normal(size=n_features) * 0.1, dtype)
    dictionary.b_dec_D[...] = jnp.asarray(rng.normal(size=d_in), dtype)
    dictionary.W_enc_DxF[...] = jnp.asarray(rng.normal(size=(d_in, n_features)), dtype)
    return dictionary


def activations(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_encode_and_decode_by_formula(kind):
    dictionary, x = make(kind), activations(30, 12)
    W_enc, b_enc, W_dec, b_dec = (
        np.asarray(p[...], np.float64)
        for p in (dictionary.W_enc_DxF, dictionary.b_enc_F, dictionary.W_dec_FxD, dictionary.b_dec_D)
    )
    f = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
    if kind == "topk":
        f[f < np.sort(f, 1)[:, [-4]]] = 0
    np.testing.assert_allclose(dictionary.encode(x), f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dictionary(x), f @ W_dec + b_dec, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(W_dec, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("kind", [*kinds.KINDS])
def test_some_features_are_encoded_as_all_are(kind):
    dictionary, x = make(kind, n_features=640), activations(30, 12)
    features = np.array([3, 0, 639, 77])
    few = dictionary.encode_features(x, features)
    np.testing.assert_allclose(few, dictionary.encode(x)[:, features], rtol=1e-5, atol=1e-5)
    assert dictionary.encode_features(x, features[:0]).shape == (30, 0)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "linear", "batchtopk", "matryoshka"])
def test_an_edit_of_few_features_encodes_no_others(kind):
    """By the operations of its compiled program."""
    dictionary, x = make(kind, n_features=4096), activations(1, 30, 12)
    edit, run = dictionary.ablate([3, 77]), ForwardPass.over(np.ones((1, 30), bool))
    operations = jax.jit(lambda x: edit(x, run)).lower(x).compile().cost_analysis()["flops"]
    assert operations < 0.1 * 2 * 30 * 12 * 4096


def test_without_decoder_rows_a_dictionary_encodes_the_same():
    """As in attribution, and as the layers of a cross-layer transcoder, which have joined norms in their place."""
    dictionary, x = make("jumprelu"), activations(30, 12)
    arrays = {name: array for name, array in dictionary.arrays.items() if name != "W_dec_FxD"}
    encoder = Dictionary(dictionary.config, **arrays, decoder_norms_F=jnp.arange(40.0))
    np.testing.assert_array_equal(encoder.encode(x), dictionary.encode(x))
    few = encoder.restrict(np.array([5, 2])).encode(x)
    np.testing.assert_allclose(few, dictionary.encode(x)[:, [5, 2]], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(encoder.decoder_norms_F, np.arange(40))
    assert sorted(encoder.arrays) == sorted(arrays)
    with pytest.raises(KeyError, match="b_enc_F"):
        Dictionary(dictionary.config, W_enc_DxF=arrays["W_enc_DxF"])


def test_a_kind_that_overrides_encode_must_say_again_that_it_is_elementwise():
    class Sharpened(kinds.JumpReLU):
        def encode(self, dictionary, pre_xF, projected_xF, numbers):
            return jax.nn.softmax(pre_xF)

    assert kinds.JumpReLU.is_elementwise() and not Sharpened.is_elementwise() and not kinds.TopK.is_elementwise()


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 3, 12), (0, 12)])
def test_any_leading_dimensions(shape):
    dictionary = make()
    assert dictionary.encode(activations(*shape)).shape == (*shape[:-1], 40)
    assert dictionary(activations(*shape)).shape == shape


@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_gradients_against_finite_differences(kind):
    with jax.enable_x64(True):
        graph, params = nnx.split(make(kind, dtype="float64"))
        x = jnp.asarray(activations(9, 12), jnp.float64)

        def loss(params):
            dictionary = nnx.merge(graph, params)
            f = dictionary.encode(x)
            error = losses.squared_error(x, dictionary.decode(f))
            return error + 0.3 * losses.l1_norm_weighted(f, dictionary.decoder_norms_F)

        grads = jax.grad(loss)(params)
        for leaf, name in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
            direction = jnp.asarray(np.random.default_rng(leaf).normal(size=name[1].shape))
            zero = jax.tree.map(jnp.zeros_like, params)
            flat, tree = jax.tree.flatten(zero)
            flat[leaf] = direction
            step = jax.tree.unflatten(tree, flat)
            move = lambda h, step=step: jax.tree.map(lambda p, s: p + h * s, params, step)  # noqa: E731
            numeric = (loss(move(1e-6)) - loss(move(-1e-6))) / 2e-6
            analytic = jnp.sum(jax.tree.leaves(grads)[leaf] * direction)
            assert abs(numeric - analytic) < 1e-6 * (1 + abs(numeric)), name[0]
            assert abs(numeric) > 0, name[0]


def test_bfloat16_products_round_operands_and_sum_in_float32():
    a, b = activations(7, 300), activations(300, 5, seed=6)
    rounded = np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) @ np.asarray(
        jnp.asarray(b, jnp.bfloat16), np.float64
    )
    product = matmul(jnp.asarray(a), jnp.asarray(b), "bfloat16")
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, rounded, rtol=1e-4, atol=1e-4)
    grad_a, grad_b = jax.grad(lambda a, b: jnp.sum(matmul(a, b, "bfloat16") ** 2), (0, 1))(
        jnp.asarray(a), jnp.asarray(b)
    )
    np.testing.assert_allclose(grad_a, 2 * rounded @ b.T, rtol=0.03, atol=0.03 * np.abs(grad_a).max())
    np.testing.assert_allclose(grad_b, a.T @ (2 * rounded), rtol=0.03, atol=0.03 * np.abs(grad_b).max())


@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_a_saved_dictionary_comes_back_the_same(kind, tmp_path):
    dictionary, x = make(kind), activations(20, 12)
    save_dictionary(tmp_path / "sae", dictionary)
    loaded = load_dictionary(tmp_path / "sae")
    assert loaded.config == dictionary.config
    np.testing.assert_array_equal(loaded.encode(x), dictionary.encode(x))
    with pytest.raises(UserError, match="already holds"):
        save_dictionary(tmp_path / "sae", dictionary)


@pytest.mark.parametrize("first", [True, False])
def test_every_process_gathers_every_array(tmp_path, monkeypatch, first):
    asked, own = [], formats.own
    monkeypatch.setattr(own, "is_first_process", lambda: first)
    monkeypatch.setattr(own, "to_host", lambda array: asked.append(array.shape) or np.asarray(array))
    dictionary = Dictionary.initial(DictionaryConfig("topk", "resid_post.0", 4, 8, k=2), jax.random.key(0))
    save_dictionary(tmp_path / "one", dictionary)
    assert asked == [array.shape for array in dictionary.arrays.values()]  # parts of it may be with any of them
    assert (tmp_path / "one" / own.DESCRIPTION).exists() == first


def test_damaged_and_missing_dictionaries_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no dictionary"):
        load_dictionary(tmp_path)
    save_dictionary(tmp_path / "a", make())
    description = tmp_path / "a" / "dictionary.json"
    description.write_text(description.read_text().replace('"sha256": "', '"sha256": "0', 1))
    with pytest.raises(UserError, match="does not match"):
        load_dictionary(tmp_path / "a")
    save_dictionary(tmp_path / "b", make())
    for path in (tmp_path / "b" / "arrays").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_dictionary(tmp_path / "b")


def test_ablation_removes_what_the_features_add_and_nothing_else():
    dictionary, x = make(), activations(2, 5, 12)
    f = np.asarray(dictionary.encode(x))
    features = [int(i) for i in np.argsort(-f.sum((0, 1)))[:3]]
    mask = np.ones((2, 5), bool)
    mask[1, 3:] = False
    edited = np.asarray(dictionary.ablate(features)(jnp.asarray(x), ForwardPass.over(jnp.asarray(mask))))
    expected = x - np.where(mask[..., None], f[..., features] @ np.asarray(dictionary.W_dec_FxD[...])[features], 0)
    np.testing.assert_allclose(edited, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(edited[1, 3:], x[1, 3:])
    last = np.asarray(
        dictionary.ablate(features, positions="last")(jnp.asarray(x), ForwardPass.over(jnp.asarray(mask)))
    )
    changed = np.any(last != x, axis=-1)
    assert not changed[0, :4].any() and not changed[1, [0, 1, 3, 4]].any()
    np.testing.assert_allclose(last[0, 4], expected[0, 4], rtol=1e-5, atol=1e-5)


def test_sinks_pass_edits_bit_for_bit():
    x = activations(1, 4, 12)
    x[0, 0] *= 1000
    dictionary = make(max_norm=100.0)
    edited = dictionary.ablate(range(40))(jnp.asarray(x), ForwardPass.over(jnp.ones((1, 4), bool)))
    np.testing.assert_array_equal(edited[0, 0], x[0, 0])
    assert np.any(np.asarray(edited[0, 1:]) != x[0, 1:])


def test_ablating_a_feature_that_does_not_fire_changes_no_bit():
    dictionary, x = make(), jnp.asarray(activations(3, 6, 12))
    silent = np.flatnonzero(np.asarray(dictionary.encode(x)).sum((0, 1)) == 0)
    assert len(silent)
    np.testing.assert_array_equal(
        dictionary.ablate(silent[:2].tolist())(x, ForwardPass.over(jnp.ones((3, 6), bool))), x
    )


def test_edits_name_what_is_wrong():
    with pytest.raises(UserError, match="0 to 39"):
        make().ablate([40])
    with pytest.raises(UserError, match="unknown positions 'first'"):
        make().ablate([1], positions="first")


def test_config_refuses_unknown_kinds():
    with pytest.raises(UserError, match="expected one of"):
        dataclasses.replace(make().config, kind="dense")


def test_a_dictionary_is_a_pytree_that_programs_take_as_it_is():
    traced = []

    @jax.jit
    def encode(dictionary, x):
        traced.append(dictionary.config)
        return dictionary.encode(x)

    plain, doubled, x = make(), jax.tree.map(lambda array: 2 * array, make()), jnp.asarray(activations(3, 12))
    np.testing.assert_array_equal(encode(plain, x), plain.encode(x))
    np.testing.assert_allclose(encode(jax.device_put(doubled), x), doubled.encode(x), rtol=1e-5)
    assert len(traced) == 1, "what is static of both is the same"
    encode(make(k=5), x)
    assert len(traced) == 2
    abstract = jax.eval_shape(make)
    assert abstract.config == plain.config and abstract.W_enc_DxF.shape == (12, 40)
    assert jax.tree.structure(abstract) == jax.tree.structure(plain)
    (gradient,) = jax.tree.leaves(jax.grad(lambda dictionary: dictionary(x).sum())(plain).b_dec_D)
    assert gradient.shape == (12,)

"""Held-out scores against a plain fp64 computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_kind import KINDS

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table
from saejax.errors import UserError
from saejax.evaluation import reconstruction
from saejax.evaluation.reconstruction import reconstruct
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig

D, F = 12, 48


def make(kind: str, seed: int = 0, **changes) -> Dictionary:
    """A random dictionary with features that never fire (0 to 2) and one that always does (5)."""
    topk = dict(k=5) if kind == "topk" else {}
    linear = dict(fires_above=0.4) if kind == "linear" else {}
    config = DictionaryConfig(**dict(kind=kind, site="resid_post.1", d_in=D, n_features=F) | topk | linear | changes)
    rng = np.random.default_rng(seed)
    arrays = {name: 0.3 * rng.normal(size=shape) for name, (shape, _) in parameter_table(config).items()}
    arrays["W_dec_FxD"] /= np.linalg.norm(arrays["W_dec_FxD"], axis=1, keepdims=True)
    arrays["W_enc_DxF"] = arrays["W_dec_FxD"].T.copy()
    arrays["W_enc_DxF"][:, :3] = 0
    low = 0.0 if kind == "linear" else -1e6
    for name in ("b_enc_F", "b_mag_F"):
        if name in arrays:
            arrays[name][:3], arrays[name][5] = low, 100.0
    return Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


def activations(seed: int = 1, tokens: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, D)).astype(np.float32) + 3


def check(scores, dictionary: Dictionary, x, y):
    """Every score against its definition, in fp64, from the dictionary's own activations."""
    f = np.asarray(dictionary.encode(x), np.float64)
    fires = np.abs(f) > dictionary.config.fires_above if dictionary.config.kind == "linear" else f > 0
    y_hat = f @ np.asarray(dictionary.W_dec_FxD[...], np.float64) + np.asarray(dictionary.b_dec_D[...], np.float64)
    if dictionary.config.skip:
        y_hat += x.astype(np.float64) @ np.asarray(dictionary.W_skip_DxD[...], np.float64)
    error = np.square(y - y_hat).sum() / np.square(y - y.mean(0, dtype=np.float64)).sum()
    np.testing.assert_allclose(scores.explained_variance, 1 - error, rtol=1e-5)
    np.testing.assert_allclose(scores.fvu, error, rtol=1e-5)
    cosine = (y * y_hat).sum(1) / np.linalg.norm(y.astype(np.float64), axis=1) / np.linalg.norm(y_hat, axis=1)
    np.testing.assert_allclose(scores.cosine, cosine.mean(), rtol=1e-5)
    assert scores.tokens == len(x)
    np.testing.assert_allclose(scores.l0, fires.sum(1).mean())
    np.testing.assert_allclose(scores.firing_rate_F, fires.mean(0))
    mean = (np.abs(f) * fires).sum(0) / np.maximum(fires.sum(0), 1)
    np.testing.assert_allclose(scores.mean_activation_F, mean, rtol=1e-5)
    assert scores.dead_fraction == np.mean(fires.sum(0) == 0) >= 3 / F
    assert scores.dense_fraction(0.99) == np.mean(fires.mean(0) > 0.99) > 0
    histogram = scores.density_histogram()
    assert sum(histogram.counts) + histogram.never == F


def test_scores_of_three_tokens_by_hand():
    config = DictionaryConfig(kind="standard", site="resid_post.1", d_in=2, n_features=3, centred=False)
    weights = dict(
        W_enc_DxF=[[1, 0, 0], [0, 1, 0]], W_dec_FxD=[[1, 0], [0, 0.5], [1, 1]], b_enc_F=[0] * 3, b_dec_D=[0] * 2
    )
    dictionary = Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in weights.items()})
    x = np.array([[1, 0], [0, 2], [3, 4]], np.float32)  # f: (1, 0, 0), (0, 2, 0), (3, 4, 0); y: (1, 0), (0, 1), (3, 2)
    (scores,) = reconstruct([dictionary], [[x]], make_mesh(), batch=3)
    fvu = (1 + 4) / (1 + 4 + 25 - 3 * ((4 / 3) ** 2 + 2**2))
    assert scores.fvu == pytest.approx(fvu) and scores.explained_variance == pytest.approx(1 - fvu)
    assert scores.cosine == pytest.approx((1 + 1 + 17 / (5 * 13**0.5)) / 3)
    assert scores.tokens == 3 and scores.l0 == pytest.approx(4 / 3) and scores.dead_fraction == pytest.approx(1 / 3)
    np.testing.assert_allclose(scores.firing_rate_F, [2 / 3, 2 / 3, 0])
    np.testing.assert_allclose(scores.mean_activation_F, [2, 3, 0])
    assert scores.dense_fraction(0.5) == pytest.approx(2 / 3) and scores.density_histogram().never == 1


def test_of_one_token_the_features_that_fire_are_counted():
    (scores,) = reconstruct([make("topk")], [[activations()[:1]]], make_mesh(), batch=32)
    histogram = scores.density_histogram()
    assert sum(histogram.counts) == np.sum(scores.firing_rate_F > 0) > 0 and histogram.log10_edges[-1] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(100,), (64, 1, 35)])
def test_scores_by_formula_whatever_the_blocks(kind, sizes):
    dictionary, x = make(kind), activations()
    blocks = [[block] for block in np.split(x, np.cumsum(sizes)[:-1])]
    (scores,) = reconstruct([dictionary], blocks, make_mesh(), batch=32)
    check(scores, dictionary, x, x)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_scored_against_its_target(skip):
    dictionary = make("jumprelu", site="mlp_in.1", target="mlp_out.1", centred=False, skip=skip)
    x, y = activations(), activations(2) - 2
    (scores,) = reconstruct([dictionary], [(x, y)], make_mesh(), batch=32)
    check(scores, dictionary, x, y)
    if not skip:
        assert scores.explained_variance < 0  # it knows nothing of y, and says so


@pytest.mark.usefixtures("cold_programs")
@pytest.mark.parametrize("kind", ["topk", "linear", "batchtopk"])
def test_members_of_a_stack_share_one_program_and_nothing_else(kind):
    own = [dict(k=k) for k in (2, 5, 9)] if kind == "topk" else [dict()] * 3
    own = [dict(fires_above=limit) for limit in (0.1, 0.4, 2.0)] if kind == "linear" else own
    stack = [make(kind, seed, **changes) for seed, changes in enumerate(own)]
    x = activations()
    before = reconstruction._score._cache_size()
    together = reconstruct(stack, [[x]], make_mesh(MeshConfig(data=4, model=2)), batch=64)
    assert reconstruction._score._cache_size() == before + 1
    for dictionary, scores in zip(stack, together, strict=True):
        check(scores, dictionary, x, x)
    if kind != "batchtopk":
        assert len({scores.l0 for scores in together}) == 3


def test_dictionaries_of_different_shapes_are_not_one_program():
    with pytest.raises(ValueError, match="one kind and shape"):
        reconstruct([make("topk"), make("standard")], [[activations()]], make_mesh())


def test_a_large_mean_costs_no_precision():
    x = np.random.default_rng(2).normal(size=(5000, D)).astype(np.float32) + 1000
    dictionary = make("standard")
    dictionary.W_dec_FxD[...] = jnp.zeros((F, D))
    dictionary.b_dec_D[...] = jnp.asarray(x.mean(0, dtype=np.float64), jnp.float32)
    (scores,) = reconstruct([dictionary], [[x]], make_mesh(), batch=512)
    assert abs(scores.explained_variance) < 1e-6


def test_bfloat16_activations_and_a_token_of_zeros():
    dictionary, x = make("topk"), activations(tokens=3)
    x[1] = 0
    low = np.asarray(jnp.asarray(x, jnp.bfloat16))
    (scores,) = reconstruct([dictionary], [[low]], make_mesh(), batch=8)
    y_hat = np.asarray(dictionary(low), np.float64)
    wide = low.astype(np.float64)
    cosine = [(wide[i] @ y_hat[i]) / np.linalg.norm(wide[i]) / np.linalg.norm(y_hat[i]) for i in (0, 2)]
    np.testing.assert_allclose(scores.cosine, sum(cosine) / 3, rtol=1e-4)


def test_one_token_has_no_variance_to_explain():
    (scores,) = reconstruct([make("standard")], [[activations(tokens=1)]], make_mesh(), batch=8)
    assert (scores.tokens, scores.explained_variance) == (1, 0.0)


def test_nothing_to_score_is_an_error():
    with pytest.raises(UserError, match="no held-out activations"):
        reconstruct([make("topk")], [], make_mesh())


def test_a_dictionary_with_nan_is_an_error():
    dictionary = make("standard")
    dictionary.b_dec_D[...] = dictionary.b_dec_D[...].at[0].set(jnp.nan)
    with pytest.raises(UserError, match="not finite"):
        reconstruct([dictionary], [[activations()]], make_mesh())


def test_dead_features_and_members_keep_their_own_sink_rule_out_of_the_program():
    one = make("standard")
    two = Dictionary(dataclasses.replace(one.config, site="resid_post.2", max_norm=3.0), **one.arrays)
    first, second = reconstruct([one, two], [[activations()]], make_mesh(), batch=64)
    assert first.explained_variance == second.explained_variance
    assert jax.tree.all(jax.tree.map(np.array_equal, first.firing_rate_F, second.firing_rate_F))

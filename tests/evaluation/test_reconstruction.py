"""Held-out scores against a plain fp64 computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_kind import KINDS

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.modules import parameter_table
from saejax.errors import UserError
from saejax.evaluation import reconstruction
from saejax.evaluation.parts import part_variances
from saejax.evaluation.reconstruction import reconstruct
from saejax.parallel.mesh import by_row, make_mesh
from saejax.parallel.settings import MeshConfig

D, F = 12, 48


def make(kind: str, seed: int = 0, **changes) -> Dictionary:
    """A random dictionary with features that never fire (0 to 2) and one that always does (5)."""
    topk = dict(k=5) if kind in ("topk", "matching_pursuit") else {}
    linear = dict(fires_above=0.4) if kind == "linear" else {}
    config = DictionaryConfig(**dict(kind=kind, site="resid_post.1", d_in=D, n_features=F) | topk | linear | changes)
    rng = np.random.default_rng(seed)
    arrays = {name: 0.3 * rng.normal(size=shape) for name, (shape, _) in parameter_table(config).items()}
    arrays["W_dec_FxD"] /= np.linalg.norm(arrays["W_dec_FxD"], axis=1, keepdims=True)
    if kind == "matching_pursuit":  # which reads its rows
        arrays["W_dec_FxD"][:3], arrays["W_dec_FxD"][5] = 0, D**-0.5
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
    cosine = (y * y_hat).sum(1) / np.linalg.norm(y.astype(np.float64), axis=1) / np.linalg.norm(y_hat, axis=1)
    np.testing.assert_allclose(scores.cosine, cosine.mean(), rtol=1e-5)
    assert scores.tokens == len(x)
    np.testing.assert_allclose(scores.l0, fires.sum(1).mean())
    np.testing.assert_allclose(scores.firing_rate_F, fires.mean(0))
    mean = (np.abs(f) * fires).sum(0) / np.maximum(fires.sum(0), 1)
    np.testing.assert_allclose(scores.mean_activation_F, mean, rtol=1e-5)
    assert scores.dead_fraction == np.mean(fires.sum(0) == 0) >= 3 / F
    assert scores.dense_fraction == np.mean(fires.mean(0) > 0.1) > 0
    histogram = scores.density_histogram()
    assert sum(histogram.counts) + histogram.never == F


@pytest.mark.parametrize(("kind", "sizes"), [*((kind, (64, 1, 35)) for kind in KINDS), ("topk", (100,))])
def test_scores_by_formula_whatever_the_blocks(kind, sizes, one_device):
    dictionary, x, mesh = make(kind), activations(), make_mesh() if kind == "topk" else one_device
    blocks = [[block] for block in np.split(x, np.cumsum(sizes)[:-1])]
    (scores,) = reconstruct([dictionary], blocks, mesh, batch=32)
    check(scores, dictionary, x, x)


def test_devices_that_do_not_divide_a_batch_share_its_tokens(monkeypatch):
    sizes = []
    monkeypatch.setattr(reconstruction, "by_row", lambda *args: [sizes.append(len(args[1])), *by_row(*args)][1:])
    mesh, dictionary, x = make_mesh(MeshConfig(data=3), jax.devices()[:3]), make("standard"), activations()
    (scores,) = reconstruct([dictionary], [[x]], mesh, batch=32)
    check(scores, dictionary, x, x)
    assert set(sizes) == {33}


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_scored_against_its_target(skip, one_device):
    dictionary = make("jumprelu", site="mlp_in.1", target="mlp_out.1", centred=False, skip=skip)
    x, y = activations(), activations(2) - 2
    (scores,) = reconstruct([dictionary], [(x, y)], one_device, batch=32)
    check(scores, dictionary, x, y)


@pytest.mark.parametrize(
    "changes",
    [
        *(dict(kind="standard", input_norm=norm) for norm in ("layer_norm", "token_norm", "center")),
        dict(kind="standard", input_norm="layer_norm", output_units=True),
        dict(kind="topk", k=F - 2, signed=True),
        dict(kind="topk", k=3, widths=(8, D - 8), scales=(1.0, 2.0)),
    ],
)
def test_dictionaries_with_conventions_of_other_tools_are_scored_by_them(changes, one_device):
    """Each token normalised, activations in the site's units, values below 0 kept, parts side by side."""
    dictionary = make(**changes)
    (scores,) = reconstruct([dictionary], [[activations()]], one_device, batch=32)
    x_NxD = np.asarray(activations(), np.float32)
    f_NxF = np.asarray(dictionary.encode(x_NxD))
    y_NxD = np.asarray(dictionary.decode(f_NxF, x_NxD), np.float64)
    error = np.square(x_NxD - y_NxD).sum() / np.square(x_NxD - x_NxD.mean(axis=0)).sum()
    assert 1 - scores.explained_variance == pytest.approx(error, rel=1e-5)
    assert scores.l0 == pytest.approx(np.asarray(dictionary.fires(f_NxF)).sum(axis=1).mean())


def test_of_one_token_the_features_that_fire_are_counted_and_no_variance_is_explained():
    (scores,) = reconstruct([make("topk")], [[activations()[:1]]], make_mesh(), batch=32)
    histogram = scores.density_histogram()
    assert sum(histogram.counts) == np.sum(scores.firing_rate_F > 0) > 0 and histogram.log10_edges[-1] == 0
    assert (scores.tokens, scores.explained_variance) == (1, 0.0)


@pytest.mark.parametrize("noise", [0.0, 3e-7])
def test_of_targets_that_are_constant_but_for_rounding_no_variance_is_explained(noise, one_device):
    rng = np.random.default_rng(3)
    x = (rng.normal(size=D) * (1 + noise * rng.normal(size=(300, D)))).astype(np.float32)
    (scores,) = reconstruct([make("topk")], [[x]], one_device, batch=64)
    assert scores.explained_variance == 0
    config = dict(site="a.0+b.0", widths=(4, D - 4), scales=(1.0, 1.0), max_norms=(1e9, 1e9))
    assert part_variances([make("standard", **config)], [[x]]) == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("kind", "settings"), [("topk", ("k", 2, 5, 9)), ("linear", ("fires_above", 0.1, 0.4, 2.0)), ("batchtopk", ())]
)
def test_members_of_a_stack_share_one_program_and_nothing_else(kind, settings):
    each = [{settings[0]: value} for value in settings[1:]] or [{}] * 3
    stack = [make(kind, seed, **changes) for seed, changes in enumerate(each)]
    x = activations()
    before = reconstruction._score._cache_size()
    together = reconstruct(stack, [[x]], make_mesh(MeshConfig(data=4, model=2)), batch=64)
    assert reconstruction._score._cache_size() == before + 1
    for dictionary, scores in zip(stack, together, strict=True):
        check(scores, dictionary, x, x)
    assert not settings or len({scores.l0 for scores in together}) == 3


def test_a_large_mean_costs_no_precision(one_device):
    x = np.random.default_rng(2).normal(size=(5000, D)).astype(np.float32) + 1000
    dictionary = make("standard")
    dictionary.W_dec_FxD[...] = jnp.zeros((F, D))
    dictionary.b_dec_D[...] = jnp.asarray(x.mean(0, dtype=np.float64), jnp.float32)
    (scores,) = reconstruct([dictionary], [[x]], one_device, batch=512)
    assert abs(scores.explained_variance) < 1e-6


def test_bfloat16_activations_and_a_token_of_zeros(one_device):
    dictionary, x = make("topk"), activations(tokens=3)
    x[1] = 0
    low = np.asarray(jnp.asarray(x, jnp.bfloat16))
    (scores,) = reconstruct([dictionary], [[low]], one_device, batch=8)
    y_hat = np.asarray(dictionary(low), np.float64)
    wide = low.astype(np.float64)
    cosine = [(wide[i] @ y_hat[i]) / np.linalg.norm(wide[i]) / np.linalg.norm(y_hat[i]) for i in (0, 2)]
    np.testing.assert_allclose(scores.cosine, sum(cosine) / 3, rtol=1e-4)


def test_what_cannot_be_scored():
    broken, x = make("standard"), activations()
    broken.b_dec_D[...] = broken.b_dec_D[...].at[0].set(jnp.nan)
    for stack, blocks, error, message in [
        ([make("topk")], [], UserError, "no held-out activations"),
        ([broken], [[x]], UserError, "not finite"),
        ([make("topk"), make("standard")], [[x]], ValueError, "one kind and shape"),
    ]:
        with pytest.raises(error, match=message):
            reconstruct(stack, blocks, make_mesh())

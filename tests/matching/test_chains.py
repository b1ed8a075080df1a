"""Chains, shares and maps on made-up dictionaries whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.matching.rows import rotate
from saejax.matching.transfer.chains import FeaturePairs, Followed, Link, follow
from saejax.matching.transfer.reconstruction import AffineMap, DictionaryOnText, evaluate_at_other_site, insert_maps
from saejax.parallel.mesh import make_mesh


def link(*partners, value=0.8):
    return Link(np.array(partners), np.full(len(partners), value))


def test_planted_chains_are_followed():
    links = [link(2, -1, 0), link(-1, 1, 2, value=0.9), link(0, -1, 1)]
    assert follow(links) == [
        Followed(0, (0, 2, 2, 1), 0.8),
        Followed(1, (1, 1), 0.9),
        Followed(0, (2, 0), 0.8),
        Followed(2, (0, 0), 0.8),
    ]
    assert follow([link(-1, -1)]) == [] and follow([]) == []
    columns = ([4, 4, 4, 5], [0, 1, 2, 0], [1, 0, -1, 0], [0.9, 0.3, np.nan, 1.0], [0, 1, 2, 0], [0.2, 0.8, 0.1, 1.0])
    pairs = FeaturePairs(*map(np.array, columns))
    assert pairs.link(4, null=False).back(3).partner_F.tolist() == [-1, 0, -1]
    assert pairs.link(4, null=True).partner_F.tolist() == [-1, 1, -1]


def made(kind="topk", width=6, features=12, seed=0, **more):
    config = DictionaryConfig(
        kind=kind, site="resid_post.0", d_in=width, n_features=features, k=3 * (kind == "topk"), **more
    )
    own = Dictionary.initial(config, jax.random.key(seed))
    arrays = own.arrays | dict(b_dec_D=jnp.arange(width) / 3.0, b_enc_F=jnp.linspace(-0.1, 0.2, features))
    if kind == "jumprelu":
        arrays["threshold_F"] = jnp.linspace(0.1, 0.9, features)
    return Dictionary(config, **arrays)


def test_a_rotated_dictionary_does_the_same_on_turned_values():
    own, turned = made(), rotate(made(), [3])
    turn = np.asarray(turned.W_dec_FxD[...]).T @ np.linalg.pinv(np.asarray(own.W_dec_FxD[...]).T)
    np.testing.assert_allclose(turn @ turn.T, np.eye(6), atol=1e-5)
    b, x = np.asarray(own.b_dec_D[...]), np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    np.testing.assert_allclose(turned.encode((x - b) @ turn.T + b), own.encode(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated"])
def test_a_rotated_transcoder_turns_about_the_centre_of_what_it_reads(kind):
    """A defect: it turned about its decoder's bias, which lies at its target."""
    own, centre_D = made(kind, target="mlp_out.0", centred=False), np.linspace(-3, 2, 6)
    turned = rotate(own, [3], centre_D)
    turn = np.asarray(turned.W_dec_FxD[...]).T @ np.linalg.pinv(np.asarray(own.W_dec_FxD[...]).T)
    x = (centre_D + np.random.default_rng(0).normal(size=(20, 6))).astype(np.float32)
    f = np.asarray(own.encode(x))
    np.testing.assert_allclose(turned.encode(((x - centre_D) @ turn.T + centre_D).astype(np.float32)), f, atol=1e-4)
    assert f.any()
    with pytest.raises(ValueError, match="give centre_D"):
        rotate(own, [3])


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated", "standard"])
def test_between_exact_maps_a_dictionary_is_itself(kind):
    """Values that are an affine image of the dictionary's own: it explains as much of them as at home."""
    rng = np.random.default_rng(1)
    own = made(kind)
    there = made("standard", width=9, seed=2)
    x = rng.normal(size=(400, 6)).astype(np.float32)
    matrix, shift = rng.normal(size=(6, 9)), rng.normal(size=9)
    y = (x @ matrix + shift).astype(np.float32)
    into, back = AffineMap.fit(y, x), AffineMap.fit(x, y)
    moved = insert_maps(own, into, back, there)
    # The maps are a little regularised, so that a feature at its threshold may change.
    assert (np.abs(np.asarray(moved.encode(y)) - np.asarray(own.encode(x))) < 0.03).mean() > 0.995
    assert (np.abs(np.asarray(moved(y)) - np.asarray(own(x)) @ matrix - shift[None]) < 0.15).mean() > 0.99
    assert moved.config.d_in == 9 and moved.site == there.site


def test_a_map_makes_up_for_a_shift():
    rng, mesh = np.random.default_rng(2), make_mesh()
    dictionary = made(width=16, features=32)
    f = rng.random((600, 32)) * (rng.random((600, 32)) < 0.06)
    x = (f @ np.asarray(dictionary.W_dec_FxD[...]) + np.asarray(dictionary.b_dec_D[...])).astype(np.float32)
    here, there = (DictionaryOnText(dictionary, each[:300], each[300:]) for each in (x, 2 * x + 1))
    shifted = evaluate_at_other_site(here, there, mesh, 64, [1])
    # The score of the other site's dictionary is that on its site's values.
    turned_round = evaluate_at_other_site(there, here, mesh, 64, [1])
    assert turned_round.native.explained_variance > shifted.native.explained_variance
    assert shifted.affine.explained_variance > shifted.direct.explained_variance
    assert shifted.affine.explained_variance > shifted.affine_null.explained_variance


def test_the_ridge_is_chosen_by_cross_validation():
    """On few rows the chosen ridge is larger, and explains more of held-out rows, than a small fixed one."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1200, 120)) @ rng.normal(size=(120, 120))
    y = x @ rng.normal(size=(120, 20)) + 40 * rng.normal(size=(1200, 20))
    few = AffineMap.fit(x[:160], y[:160])
    centred = x[:160] - x[:160].mean(0)
    gram = centred.T @ centred
    fixed = np.linalg.solve(gram + 1e-3 * np.trace(gram) / 120 * np.eye(120), centred.T @ (y[:160] - y[:160].mean(0)))
    residual = y[600:] - (x[600:] - x[:160].mean(0)) @ fixed - y[:160].mean(0)
    fixed_r2 = 1 - np.square(residual).sum() / np.square(y[600:] - y[600:].mean(0)).sum()
    assert few.ridge > 1e-3 and few.r2(x[600:], y[600:]) > fixed_r2 + 0.02
    many = AffineMap.fit(x[:600], y[:600])
    assert many.r2(x[600:], y[600:]) > few.r2(x[600:], y[600:])
    exact = x @ rng.normal(size=(120, 20)) + 3.0
    assert AffineMap.fit(x[:600], exact[:600]).r2(x[600:], exact[600:]) > 0.9999

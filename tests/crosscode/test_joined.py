"""Lengths of joined rows, latent scaling and relative norms, beside plain formulas in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.crosscode.norms import by_norms, relative_norms, shared
from saejax.crosscode.scaling import block_sums, block_weights, latent_scaling
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.joined import row_lengths, row_normals, split
from saejax.dictionaries.losses import l1_norm_weighted
from saejax.models.sites import Site, decoder_site, is_joined, parse_site, site_parts
from saejax.settings import TrainConfig
from saejax.training.updates import constrained, turn_rows

WIDTHS = (3, 5)


def test_lengths_are_summed_over_parts_and_normals_are_their_gradient():
    rows_FxD = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    rows_FxD[1, :3] = 0  # a part without a direction has no gradient
    by_hand = [np.linalg.norm(row[:3]) + np.linalg.norm(row[3:]) for row in rows_FxD.astype(np.float64)]
    np.testing.assert_allclose(row_lengths(jnp.asarray(rows_FxD), WIDTHS), by_hand, rtol=1e-6)
    np.testing.assert_allclose(row_lengths(jnp.asarray(rows_FxD)), np.linalg.norm(rows_FxD, axis=1), rtol=1e-6)
    gradient = jax.grad(lambda rows: row_lengths(rows, WIDTHS).sum())(jnp.asarray(rows_FxD))
    np.testing.assert_allclose(row_normals(jnp.asarray(rows_FxD), WIDTHS), gradient, atol=1e-6)
    f = np.abs(np.random.default_rng(1).normal(size=(6, 4)))
    expected = (f.mean(0) * by_hand).sum()
    norms_F = row_lengths(jnp.asarray(rows_FxD), WIDTHS)
    np.testing.assert_allclose(l1_norm_weighted(jnp.asarray(f), norms_F), expected, rtol=1e-6)


def test_a_turned_gradient_leaves_the_length_as_it_is():
    """To first order: finite differences along it do not change any row's summed length."""
    rng, config = np.random.default_rng(2), TrainConfig()
    rows_FxD = jnp.asarray(rng.normal(size=(4, 8)))
    rows_FxD /= row_lengths(rows_FxD, WIDTHS)[:, None]
    params, grads = dict(W_dec_FxD=rows_FxD), dict(W_dec_FxD=jnp.asarray(rng.normal(size=(4, 8))))
    turn = turn_rows(WIDTHS)
    turned, _ = turn.update(grads, turn.init(params), params)
    step = 1e-3
    change = row_lengths(rows_FxD + step * turned["W_dec_FxD"], WIDTHS) - 1
    untouched = row_lengths(rows_FxD + step * grads["W_dec_FxD"], WIDTHS) - 1
    assert np.abs(change).max() < 0.05 * np.abs(untouched).max()
    from saejax.dictionaries.kinds import by_name

    longer = dict(W_dec_FxD=3 * rows_FxD)
    after = constrained(config, by_name("topk"), longer, longer, WIDTHS)
    np.testing.assert_allclose(row_lengths(after["W_dec_FxD"], WIDTHS), 1, rtol=1e-6)


def test_relative_norms():
    norms_PxF = np.array([[1.0, 0.0, 2.0, 0.0, 1.0], [0.0, 2.0, 2.0, 0.0, 0.5]])
    relative_PxF = relative_norms(norms_PxF)
    np.testing.assert_allclose(relative_PxF, [[1, 0, 0.5, 0.5, 0.75], [0, 1, 0.5, 0.5, 0.25]])
    assert by_norms(relative_PxF).tolist() == [0, 1, -1, -1, -1]
    assert shared(relative_PxF).tolist() == [False, False, True, True, False]
    three_PxF = relative_norms(np.array([[4.0], [1.0], [0.0]]))
    np.testing.assert_allclose(three_PxF[:, 0], [1 - 0.125, 0.125, 0.0])


@pytest.mark.parametrize("same_space", [True, False])
def test_latent_scaling_is_a_regression(same_space):
    """Beside least squares with an intercept, feature by feature, in fp64; and a feature that never fires."""
    rng, widths = np.random.default_rng(3), (4, 4)
    config = DictionaryConfig(kind="standard", site="a+b", d_in=8, n_features=5, widths=widths, scales=(1.0, 1.0))
    sae = Dictionary.initial(config, jax.random.key(0))
    sae.b_enc_F[...] = jnp.asarray([0.0, 0.1, 0.2, 0.0, -1e6])
    x_NxD = rng.normal(size=(400, 8)).astype(np.float32)
    blocks = [[part[:30], part[30:]] for part in np.split(x_NxD, 8)]
    sums = block_sums(sae, range(5), blocks)
    weights_RxN = block_weights(8, 30, 0)
    assert (weights_RxN[0] == 1).all() and (weights_RxN[:, ::2].sum(1) == 4).all()
    W_dec_FxD, f_NxF = np.float64(sae.W_dec_FxD[...]), np.float64(sae.encode(x_NxD))
    made_NxD = np.float64(sae(x_NxD))
    halves = [np.concatenate([np.arange(50) + 50 * block for block in range(start, 8, 2)]) for start in (0, 1)]
    for feature in range(4):
        scaling = latent_scaling(sums, feature, W_dec_FxD[feature], 0, widths, same_space, weights_RxN)
        own_NxD = f_NxF[:, [feature]] * W_dec_FxD[feature]
        for y_NxD, found_R in ((x_NxD - made_NxD + own_NxD, scaling.error_R), (made_NxD, scaling.reconstruction_R)):
            slopes = [np.polyfit(f_NxF[half, feature], y_NxD[half], 1)[0] for half in halves]
            if same_space:
                d = W_dec_FxD[feature, :4] / np.linalg.norm(W_dec_FxD[feature, :4])
                size = [abs(sum(part @ d for part in parts)) for parts in zip(*(split(s, widths) for s in slopes))]
            else:
                size = [np.sqrt(max(one @ two, 0)) for one, two in zip(*(split(s, widths) for s in slopes))]
            assert found_R[0] == pytest.approx(size[1] / size[0], rel=2e-3)
    assert np.isnan(latent_scaling(sums, 4, W_dec_FxD[4], 0, widths, same_space, weights_RxN).error_R).all()


def test_names_of_sites():
    assert site_parts("resid_post.1+other:mlp_out.2") == ("resid_post.1", "other:mlp_out.2")
    assert site_parts("module:a+b") == ("module:a+b",) and not is_joined("module:a+b")
    assert str(parse_site("other:mlp_out.2")) == "other:mlp_out.2" and decoder_site("other:mlp_out.2") == Site(
        "mlp_out", 2
    )
    for text in ("resid_post.1+resid_post.2", "other:resid_post.1"):
        with pytest.raises(Exception, match="crosscoder"):
            Site.parse(text)

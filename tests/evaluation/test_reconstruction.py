"""Held-out scores against a plain fp64 computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.evaluation.reconstruction import reconstruct
from saejax.parallel import make_mesh


def make(kind: str) -> Dictionary:
    config = DictionaryConfig(kind=kind, site="resid_post.1", d_in=12, n_features=48, k=5)
    dictionary = Dictionary.initial(config, jax.random.key(0))
    dictionary.b_enc_F[...] = jnp.where(jnp.arange(48) < 3, -1e6, 0.1)  # features that never fire
    dictionary.b_enc_F[...] = dictionary.b_enc_F[...].at[5].set(100.0)  # one that always does
    return dictionary


@pytest.mark.parametrize("kind", ["topk", "standard"])
@pytest.mark.parametrize("sizes", [(100,), (64, 1, 35), (7,) * 14 + (2,)])
def test_scores_by_formula_whatever_the_blocks(kind, sizes):
    dictionary = make(kind)
    x = np.random.default_rng(1).normal(size=(100, 12)).astype(np.float32) + 3
    blocks = np.split(x, np.cumsum(sizes)[:-1])
    scores = reconstruct(dictionary, blocks, make_mesh(), batch=32)
    f = np.asarray(dictionary.encode(x), np.float64)
    x_hat = np.asarray(dictionary.decode(jnp.asarray(f, jnp.float32)), np.float64)
    expected = 1 - np.square(x - x_hat).sum() / np.square(x - x.mean(0, dtype=np.float64)).sum()
    np.testing.assert_allclose(scores.explained_variance, expected, rtol=1e-5)
    assert scores.tokens == 100
    np.testing.assert_allclose(scores.l0, (f > 0).sum(1).mean())
    np.testing.assert_allclose(scores.firing_rate_F, (f > 0).mean(0))
    np.testing.assert_allclose(scores.mean_activation_F, f.sum(0) / np.maximum((f > 0).sum(0), 1), rtol=1e-5)
    assert scores.dead_fraction == np.mean((f > 0).sum(0) == 0) >= 3 / 48
    assert scores.dense_fraction(0.99) == np.mean((f > 0).mean(0) > 0.99) > 0
    histogram = scores.density_histogram()
    assert sum(histogram["counts"]) + histogram["never"] == 48


def test_a_large_mean_costs_no_precision():
    x = np.random.default_rng(2).normal(size=(5000, 12)).astype(np.float32) + 1000
    dictionary = make("standard")
    dictionary.W_dec_FxD[...] = jnp.zeros((48, 12))
    dictionary.b_dec_D[...] = jnp.asarray(x.mean(0, dtype=np.float64), jnp.float32)
    assert abs(reconstruct(dictionary, [x], make_mesh(), batch=512).explained_variance) < 1e-6


def test_nothing_to_score_is_an_error():
    with pytest.raises(UserError, match="no held-out activations"):
        reconstruct(make("topk"), [], make_mesh())

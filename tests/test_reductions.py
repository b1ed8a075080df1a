"""Sums and maxima in two stages are those in one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from saejax.reductions import index_of_highest, log_sum_exp, over_last, sum_tokens


@pytest.mark.parametrize("shape", [(48, 64), (5, 33), (2, 7, 32), (1, 1), (0, 16)])
def test_they_equal_those_of_numpy(shape):
    """Sizes that sixteen does not divide, too; of members, and within gradients."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    total = jax.jit(lambda values: over_last(jnp.sum, values))(values)
    np.testing.assert_allclose(total, values.astype(np.float64).sum(-1, keepdims=True), atol=1e-5)
    is_positive = (values > 0).astype(np.float32)
    np.testing.assert_array_equal(over_last(jnp.sum, is_positive), is_positive.sum(-1, keepdims=True))
    np.testing.assert_array_equal(over_last(jnp.max, values), values.max(-1, keepdims=True))
    if len(shape) == 2:
        np.testing.assert_array_equal(sum_tokens(is_positive), is_positive.sum(0))
    members = jax.vmap(lambda values: over_last(jnp.max, values, 4))(np.stack([values, -values]))
    np.testing.assert_array_equal(members, np.stack([values, -values]).max(-1, keepdims=True))
    slope = jax.grad(lambda values: over_last(jnp.sum, jnp.square(values)).sum())(values)
    np.testing.assert_array_equal(slope, 2 * values)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 640, 50257])
def test_those_of_logits_equal_numpy(size):
    """Of one value, of fewer than the parts and of GPT-2's vocabulary; large ones, and equal ones."""
    logits_2xV = 50 * np.random.default_rng(size).normal(size=(2, size)).astype(np.float32)
    logits_2xV[1, size // 2 :] = logits_2xV[1].max()
    np.testing.assert_allclose(log_sum_exp(logits_2xV), logsumexp(logits_2xV.astype(np.float64), axis=1)[:, None], 1e-6)
    np.testing.assert_array_equal(index_of_highest(logits_2xV), logits_2xV.argmax(axis=1))
    slope_2xV = jax.grad(lambda logits: log_sum_exp(logits).sum())(logits_2xV)
    np.testing.assert_allclose(slope_2xV, softmax(logits_2xV.astype(np.float64), axis=1), atol=1e-6)

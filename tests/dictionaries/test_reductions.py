"""Sums and maxima in two stages are those in one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries.reductions import over_features, sum_tokens


@pytest.mark.parametrize("shape", [(48, 64), (5, 33), (2, 7, 32), (1, 1), (0, 16)])
def test_they_equal_those_of_numpy(shape):
    """Sizes that sixteen does not divide, too; of members, and within gradients."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    total = jax.jit(lambda values: over_features(jnp.sum, values))(values)
    np.testing.assert_allclose(total, values.astype(np.float64).sum(-1, keepdims=True), atol=1e-5)
    is_positive = (values > 0).astype(np.float32)
    np.testing.assert_array_equal(over_features(jnp.sum, is_positive), is_positive.sum(-1, keepdims=True))
    np.testing.assert_array_equal(over_features(jnp.max, values), values.max(-1, keepdims=True))
    if len(shape) == 2:
        np.testing.assert_array_equal(sum_tokens(is_positive), is_positive.sum(0))
    members = jax.vmap(lambda values: over_features(jnp.max, values, 4))(np.stack([values, -values]))
    np.testing.assert_array_equal(members, np.stack([values, -values]).max(-1, keepdims=True))
    slope = jax.grad(lambda values: over_features(jnp.sum, jnp.square(values)).sum())(values)
    np.testing.assert_array_equal(slope, 2 * values)

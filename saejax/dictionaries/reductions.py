"""Sums and maxima of many activations, in an order that XLA's compiler for CPUs does side by side.

Along an axis it takes one value after the other where it computes these values in the same loop, as 4,096 rows of 4,608
comparisons: 22 ms on two cores. In two stages, the first over sixteen of them, that takes 3 ms; without a barrier in
between it would make one reduction of both. Sums are added up in another order, which counts up to 2^24 do not notice.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_PARTS = 16  # values that the first stage takes


def over_features(reduce: Callable, values_xF: jax.Array, parts: int = _PARTS) -> jax.Array:
    """Return a sum, or maximum, over the last axis, [..., 1].

    Args:
      reduce: ``jnp.sum`` or ``jnp.max``.
      values_xF: the values.
      parts: number of values that the first stage takes.
    """

    def in_stages(values_xF: jax.Array) -> jax.Array:
        *before, features = values_xF.shape
        if features % parts:
            return reduce(values_xF, axis=-1, keepdims=True)
        part_xN = reduce(values_xF.reshape(*before, parts, features // parts), axis=-2)
        return reduce(lax.optimization_barrier(part_xN), axis=-1, keepdims=True)

    at_once = functools.partial(reduce, axis=-1, keepdims=True)
    return lax.platform_dependent(values_xF, cpu=in_stages, default=at_once)


def sum_tokens(values_BxF: jax.Array) -> jax.Array:
    """Return the sum over tokens, [F]."""

    def in_stages(values_BxF: jax.Array) -> jax.Array:
        tokens, features = values_BxF.shape
        if tokens % _PARTS:
            return jnp.sum(values_BxF, axis=0)
        part_NxF = jnp.sum(values_BxF.reshape(tokens // _PARTS, _PARTS, features), axis=1)
        return jnp.sum(lax.optimization_barrier(part_NxF), axis=0)

    return lax.platform_dependent(values_BxF, cpu=in_stages, default=functools.partial(jnp.sum, axis=0))

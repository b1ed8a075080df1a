"""Sums, maxima and the like of many values, in an order that XLA's compiler for CPUs does side by side.

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
_GROUPS = 16  # consecutive parts of a long axis, each of which is reduced by itself
_LONG = 4096  # values


def over_last(reduce: Callable, values: jax.Array, parts: int = _PARTS) -> jax.Array:
    """Return a sum, maximum or minimum over the last axis, [..., 1].

    Args:
      reduce: ``jnp.sum``, ``jnp.max`` or ``jnp.min``.
      values: the values; at least one along the last axis, but for sums. Devices that split this axis reduce their own
        values first, where these are many and the devices divide sixteen.
      parts: number of values that the first stage takes.
    """
    at_once = functools.partial(reduce, axis=-1, keepdims=True)

    def in_stages(values: jax.Array) -> jax.Array:
        *before, size = values.shape
        groups = _GROUPS if size >= _LONG else 1
        side_by_side = size // (groups * parts)
        if not side_by_side:
            return at_once(values)
        taken = groups * parts * side_by_side
        first = reduce(values[..., :taken].reshape(*before, groups, parts, side_by_side), axis=-2)
        whole = reduce(lax.optimization_barrier(first), axis=(-2, -1))[..., None]
        if taken == size:
            return whole
        return at_once(jnp.concatenate([whole, at_once(values[..., taken:])], axis=-1))

    return lax.platform_dependent(values, cpu=in_stages, default=at_once)


def sum_tokens(values_BxF: jax.Array) -> jax.Array:
    """Return the sum over tokens, [F]."""

    def in_stages(values_BxF: jax.Array) -> jax.Array:
        tokens, features = values_BxF.shape
        if tokens % _PARTS:
            return jnp.sum(values_BxF, axis=0)
        part_NxF = jnp.sum(values_BxF.reshape(tokens // _PARTS, _PARTS, features), axis=1)
        return jnp.sum(lax.optimization_barrier(part_NxF), axis=0)

    return lax.platform_dependent(values_BxF, cpu=in_stages, default=functools.partial(jnp.sum, axis=0))


def log_sum_exp(logits_xV: jax.Array) -> jax.Array:
    """Return the logarithm of the sum of exponentials over the last axis, [..., 1]."""

    def in_stages(logits_xV: jax.Array) -> jax.Array:
        highest_x1 = lax.stop_gradient(over_last(jnp.max, logits_xV))
        return highest_x1 + jnp.log(over_last(jnp.sum, jnp.exp(logits_xV - highest_x1)))

    at_once = functools.partial(jax.nn.logsumexp, axis=-1, keepdims=True)
    return lax.platform_dependent(logits_xV, cpu=in_stages, default=at_once)


def index_of_highest(logits_xV: jax.Array) -> jax.Array:
    """Return the index of the largest value, int32 [...]; of equal ones the first, of NaN the number of values."""

    def in_stages(logits_xV: jax.Array) -> jax.Array:
        size = logits_xV.shape[-1]
        is_highest_xV = logits_xV == over_last(jnp.max, logits_xV)
        return over_last(jnp.min, jnp.where(is_highest_xV, jnp.arange(size, dtype=jnp.int32), size))[..., 0]

    at_once = functools.partial(jnp.argmax, axis=-1)
    return lax.platform_dependent(logits_xV, cpu=in_stages, default=lambda logits: at_once(logits).astype(jnp.int32))

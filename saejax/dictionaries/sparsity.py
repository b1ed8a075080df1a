"""From pre-activations to sparse feature activations.

Every function takes ``pre_BxF`` and returns ``acts_BxF >= 0`` of the same shape; leading dimensions are free.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def relu(pre_BxF: jax.Array) -> jax.Array:
    """max(pre, 0)."""
    return jax.nn.relu(pre_BxF)


def topk(pre_BxF: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest positive pre-activations of each token; the rest are 0.

    A token with fewer than k positive pre-activations keeps those. Values that tie with the k-th largest
    to the last bit are all kept. The gradient passes through the kept ones unchanged. Exact also where
    the feature axis is sharded, because it uses nothing but counts and maxima over that axis.

    Args:
      pre_BxF: pre-activations, float32 or wider (a bfloat16 input is widened for the comparison).
      k: 1 <= k; k >= F keeps every positive one.
    """
    acts_BxF = jax.nn.relu(pre_BxF)
    return jnp.where(acts_BxF > kth_largest_below(lax.stop_gradient(acts_BxF), k), acts_BxF, jnp.zeros_like(acts_BxF))


def kth_largest_below(acts_BxF: jax.Array, k: int) -> jax.Array:
    """A threshold just below the k-th largest activation of each token.

    XLA's own top-k sorts, which on a CPU takes ten times as long as the matrix products of the step
    and on a GPU is slow for k > 16. Counting how many values lie above a threshold is one pass over
    memory, so the threshold is bisected. It starts from a tight lower bound, the k-th largest of the
    maxima of blocks of features, and stops when every token has exactly k above it. Floats that are not
    negative order as their bits do, so bisecting the bits ends, ties included, after at most as
    many passes as a float has bits.

    Args:
      acts_BxF: not negative.
      k: how many to keep.

    Returns:
      threshold_Bx1, such that ``acts > threshold`` keeps the k largest (all positive ones if fewer).
    """
    if acts_BxF.dtype == jnp.bfloat16:
        acts_BxF = acts_BxF.astype(jnp.float32)
    if k >= acts_BxF.shape[-1]:
        return jnp.zeros_like(acts_BxF[..., :1])
    integer = jnp.int64 if acts_BxF.dtype == jnp.float64 else jnp.int32
    to_bits = functools.partial(lax.bitcast_convert_type, new_dtype=integer)
    to_float = functools.partial(lax.bitcast_convert_type, new_dtype=acts_BxF.dtype)
    high_Bx1 = to_bits(acts_BxF.max(-1, keepdims=True))
    low_Bx1 = jnp.maximum(to_bits(_lower_bound(acts_BxF, k)) - 1, 0)

    def count_above(threshold_Bx1):
        # Floats, because XLA:CPU vectorises neither comparisons nor sums of integers; exact up to 2^24 features.
        return jnp.sum((acts_BxF > to_float(threshold_Bx1)).astype(jnp.float32), axis=-1, keepdims=True)

    def unsettled(carry):
        low, high, count_low = carry
        return jnp.any((count_low > k) & (high - low > 1))

    # Invariant: more than k, or all that can be told apart, lie above low; fewer than k above high.
    def halve(carry):
        low, high, count_low = carry
        middle = low + (high - low) // 2
        count = count_above(middle)
        keep = count_low <= k  # this token is settled: leave its threshold where it is
        raise_low = ~keep & (count >= k)
        lower_high = ~keep & (count < k)
        return (
            jnp.where(raise_low, middle, low),
            jnp.where(lower_high, middle, high),
            jnp.where(raise_low, count, count_low),
        )

    low_Bx1, _, _ = lax.while_loop(unsettled, halve, (low_Bx1, high_Bx1, count_above(low_Bx1)))
    return to_float(low_Bx1)


def _lower_bound(acts_BxF: jax.Array, k: int, block: int = 32) -> jax.Array:
    """The k-th largest of the maxima of blocks of features, [B, 1]; 0 where there are too few blocks.

    At least k values are as large as it, so the k-th largest value is too.
    """
    features = acts_BxF.shape[-1]
    if features % block or features // block <= k:
        return jnp.zeros_like(acts_BxF[..., :1])
    maxima_BxM = acts_BxF.reshape(*acts_BxF.shape[:-1], features // block, block).max(-1)
    return lax.top_k(maxima_BxM, k)[0][..., -1:]

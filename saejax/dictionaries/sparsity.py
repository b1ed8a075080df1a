"""From pre-activations to sparse feature activations.

Every function takes ``pre_xF`` and returns ``acts_xF`` of the same shape; leading dimensions are free.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_SAMPLED = 16  # one of so many tokens is looked at first
_BLOCK = 16  # features, of which the maximum is taken before the k largest are chosen


def relu(pre_xF: jax.Array) -> jax.Array:
    """max(pre, 0)."""
    return jax.nn.relu(pre_xF)


def gated(gate_xF: jax.Array, magnitude_xF: jax.Array) -> jax.Array:
    """max(magnitude, 0) where the gate is above 0, else 0 (Gated SAE; Rajamanoharan et al., 2024)."""
    return jnp.where(gate_xF > 0, jax.nn.relu(magnitude_xF), jnp.zeros_like(magnitude_xF))


def threshold(pre_xF: jax.Array, threshold_F: jax.Array) -> jax.Array:
    """pre where it exceeds the feature's threshold, else 0 (JumpReLU; Rajamanoharan et al., 2024)."""
    return jnp.where(pre_xF > row(threshold_F, pre_xF.ndim), pre_xF, jnp.zeros_like(pre_xF))


def topk(pre_xF: jax.Array, k: int | jax.Array, most: int | None = None) -> jax.Array:
    """Keeps the k largest positive pre-activations of each token; the rest are 0.

    A token with fewer than k positive pre-activations keeps those. Values that tie with the k-th largest
    to the last bit are all kept. The gradient passes through the kept ones unchanged. Exact also where
    the feature axis is sharded.

    Args:
      pre_xF: pre-activations, float32 or wider (a bfloat16 input is widened for the comparison).
      k: 1 <= k; k >= F keeps every positive one. May be traced; then
      most: is the largest k there can be, as a Python number.
    """
    acts_xF = jax.nn.relu(pre_xF)
    below_x1 = kth_largest_below(lax.stop_gradient(acts_xF), k, most)
    return jnp.where(acts_xF > below_x1, acts_xF, jnp.zeros_like(acts_xF))


def batch_topk(pre_BxF: jax.Array, k: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keeps the B k largest positive pre-activations of a whole batch (Bussmann et al., 2024), of any tokens.

    Returns:
      The activations, and the smallest that was kept (0 if none is positive): what an inference threshold averages.
    """
    acts_BxF = jax.nn.relu(pre_BxF)
    values_BxF = lax.stop_gradient(acts_BxF)
    highest_1x1 = values_BxF.max(keepdims=True)
    keep = jnp.asarray(k, jnp.int32) * values_BxF.shape[0]
    bounds = jnp.zeros_like(highest_1x1), highest_1x1, jnp.zeros_like(highest_1x1, jnp.int32)
    if values_BxF.shape[0] >= _SAMPLED * _SAMPLED:
        bounds = _bracket(values_BxF, keep, *bounds)
    kept_BxF = values_BxF > _search(values_BxF, keep, *bounds[:2], _count_all, bounds[2])
    smallest = jnp.min(jnp.where(kept_BxF, values_BxF, jnp.inf))
    return jnp.where(kept_BxF, acts_BxF, jnp.zeros_like(acts_BxF)), jnp.where(jnp.isfinite(smallest), smallest, 0.0)


def _bracket(
    values_BxF: jax.Array, keep: jax.Array, low_1x1: jax.Array, high_1x1: jax.Array, above_high_1x1: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Closer bounds of the threshold, and the number of values above the upper one, from some of the tokens.

    The share of values above a threshold differs little between samples of tokens, so the thresholds of a little more
    and of a little less of it in a sample nearly always enclose that of all; where they do not, a bound stays.
    """
    sample_RxF = values_BxF[::_SAMPLED]
    for share in (1.05, 0.95):
        of_sample = (keep * (share * sample_RxF.shape[0] / values_BxF.shape[0])).astype(jnp.int32)
        guess_1x1 = _search(sample_RxF, of_sample, jnp.zeros_like(low_1x1), sample_RxF.max(keepdims=True), _count_all)
        above_1x1 = _count_all(values_BxF, guess_1x1)
        is_low, is_high = (above_1x1 >= keep) & (guess_1x1 > low_1x1), (above_1x1 < keep) & (guess_1x1 < high_1x1)
        low_1x1, high_1x1 = jnp.where(is_low, guess_1x1, low_1x1), jnp.where(is_high, guess_1x1, high_1x1)
        above_high_1x1 = jnp.where(is_high, above_1x1, above_high_1x1)
    return low_1x1, high_1x1, above_high_1x1


def kth_largest_below(acts_xF: jax.Array, k: int | jax.Array, most: int | None = None) -> jax.Array:
    """A threshold just below the k-th largest activation of each token.

    XLA's own top-k sorts, which on a CPU takes ten times as long as the matrix products of the step and on a GPU is
    slow for k > 16. Instead a threshold is searched above which k values lie. The k-th largest of the maxima of
    blocks of features is a lower bound for it; and in the k blocks of the largest maxima lie the k largest values,
    so that on a CPU, where counting all values takes long, only those blocks are looked at.

    Args:
      acts_xF: not negative.
      k: how many to keep; may be traced.
      most: the largest k there can be; k itself where that is a Python number.

    Returns:
      threshold_x1, such that ``acts > threshold`` keeps the k largest (all positive ones if fewer).
    """
    acts_xF = acts_xF.astype(jnp.promote_types(acts_xF.dtype, jnp.float32))
    keep, features = jnp.asarray(k, jnp.int32), acts_xF.shape[-1]
    most = min(int(k) if most is None else most, features)
    if features % _BLOCK or most >= features // _BLOCK:
        highest_x1 = acts_xF.max(-1, keepdims=True)
        return _search(acts_xF, keep, jnp.zeros_like(highest_x1), highest_x1, _count_each)

    def all_blocks(acts_xF: jax.Array) -> jax.Array:
        maxima_xN = _blocks(acts_xF).max(-1)
        highest_x1 = maxima_xN.max(-1, keepdims=True)
        low_x1 = _search(maxima_xN, keep, jnp.zeros_like(highest_x1), highest_x1, _count_each)
        return _search(acts_xF, keep, low_x1, highest_x1, _count_each)

    def best_blocks(acts_xF: jax.Array) -> jax.Array:
        blocks_xNx16 = _blocks(acts_xF)
        largest_xK, place_xK = lax.top_k(blocks_xNx16.max(-1), most)
        chosen_xKx16 = jnp.take_along_axis(blocks_xNx16, place_xK[..., None], axis=-2, mode="promise_in_bounds")
        chosen = chosen_xKx16.reshape(*acts_xF.shape[:-1], -1)
        # Not by slices, which would keep XLA from taking its own top-k for the sort.
        low_x1, high_x1 = largest_xK.min(-1, keepdims=True), largest_xK.max(-1, keepdims=True)
        return _search(chosen, keep, low_x1, high_x1, _count_each)

    return lax.platform_dependent(acts_xF, cpu=best_blocks, default=all_blocks)


def largest(values_BxF: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values of each row, falling, and where they are, int32; both [B, K]. Of equals, the first ones.

    They lie in the k blocks of the largest maxima. XLA:CPU sorts a block's values faster than whole rows.
    """
    count, features = values_BxF.shape
    if features % _BLOCK or k >= features // _BLOCK:
        return lax.top_k(values_BxF, k)
    blocks_BxNx16 = _blocks(values_BxF)
    place_BxK = jnp.sort(lax.top_k(blocks_BxNx16.max(-1), k)[1], axis=1)  # in order, so that the first of equals is
    chosen_BxKx16 = jnp.take_along_axis(blocks_BxNx16, place_BxK[..., None], axis=1, mode="promise_in_bounds")
    value_BxK, at_BxK = lax.top_k(chosen_BxKx16.reshape(count, -1), k)
    return value_BxK, jnp.take_along_axis(place_BxK, at_BxK // _BLOCK, axis=1) * _BLOCK + at_BxK % _BLOCK


def _blocks(acts_xF: jax.Array) -> jax.Array:
    return acts_xF.reshape(*acts_xF.shape[:-1], -1, _BLOCK)


def _search(
    acts: jax.Array,
    keep: jax.Array,
    low: jax.Array,
    high: jax.Array,
    count: Callable,
    above_high: jax.Array | None = None,
) -> jax.Array:
    """The largest threshold found above which ``keep`` values lie, or more where they tie.

    The logarithm of the count falls about linearly with the threshold, so the next one to try is interpolated; the
    end that stays where it is loses half its weight each time (the Illinois rule), and every third interval is halved.
    Floats that are not negative order as their bits do, and it is the bits that are searched, so that it ends, ties
    included; it stops as soon as every threshold has exactly ``keep`` above it.

    Args:
      acts: not negative.
      keep: how many are to lie above.
      low, high: that many lie at or above ``low``, fewer above ``high``.
      count: (acts, threshold) to the number above, of the threshold's shape, int32.
      above_high: how many lie above ``high``; None: none.
    """
    integer = jnp.int64 if acts.dtype == jnp.float64 else jnp.int32
    to_bits = functools.partial(lax.bitcast_convert_type, new_dtype=integer)
    to_float = functools.partial(lax.bitcast_convert_type, new_dtype=acts.dtype)
    low_bits = jnp.maximum(to_bits(low) - 1, 0)

    def excess(above: jax.Array) -> jax.Array:  # 0 where it is ``keep``; the half is for counts of 0
        return jnp.log((above.astype(jnp.float32) + 0.5) / (keep.astype(jnp.float32) + 0.5))

    def unsettled(carry):
        low, high, above_low, *_ = carry
        return jnp.any((above_low > keep) & (high - low > 1))

    # Invariant: more than ``keep``, or all that can be told apart, lie above low; fewer above high.
    def narrow(carry):
        low, high, above_low, excess_low, excess_high, turn = carry
        share = jnp.where(turn % 3 == 2, 0.5, excess_low / (excess_low - excess_high))
        step = (share * (high - low).astype(jnp.float32)).astype(integer)
        middle = low + jnp.clip(step, 1, jnp.maximum(high - low - 1, 1))
        above = count(acts, to_float(middle))
        settled = (above_low <= keep) | (high - low <= 1)  # leave that threshold where it is
        raise_low, lower_high = ~settled & (above >= keep), ~settled & (above < keep)
        return (
            jnp.where(raise_low, middle, low),
            jnp.where(lower_high, middle, high),
            jnp.where(raise_low, above, above_low),
            jnp.where(raise_low, excess(above), excess_low / 2),
            jnp.where(lower_high, excess(above), excess_high / 2),
            turn + 1,
        )

    above_low = count(acts, to_float(low_bits))
    ends = excess(above_low), excess(jnp.zeros_like(above_low) if above_high is None else above_high)
    return to_float(lax.while_loop(unsettled, narrow, (low_bits, to_bits(high), above_low, *ends, jnp.int32(0)))[0])


def _count_each(acts_xF: jax.Array, threshold: jax.Array) -> jax.Array:
    """Values above a threshold of each token's own, or of all tokens; [..., 1]."""
    # Floats, because XLA:CPU vectorises neither comparisons nor sums of integers; exact up to 2^24 features.
    above_x1 = jnp.sum((acts_xF > threshold).astype(jnp.float32), axis=-1, keepdims=True)
    return above_x1.astype(jnp.int32)


def _count_all(acts_BxF: jax.Array, threshold_1x1: jax.Array) -> jax.Array:
    return jnp.sum(_count_each(acts_BxF, threshold_1x1), axis=0, keepdims=True, dtype=jnp.int32)


def row(vector_N: jax.Array, ndim: int) -> jax.Array:
    """A vector as an array of ``ndim`` dimensions, so that adding it promotes no rank silently."""
    return vector_N.reshape((1,) * (ndim - 1) + vector_N.shape)

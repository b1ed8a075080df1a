"""Selection of the largest of many values: thresholds that keep them, and their positions.

XLA sorts to find them, which takes as long as the products of a training step, so thresholds are searched instead.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from saejax.reductions import over_last

_SAMPLED = 16  # one token in this many is looked at first
_BLOCK = 16  # features, of which the maximum is taken before the k largest are chosen
_MOST = 2**30  # values that are counted


def batch_threshold(values_BxF: jax.Array, k: int | jax.Array) -> jax.Array:
    """Return a threshold, [1, 1], above which the B k largest of all values lie (all positive ones if fewer).

    No value is negative; k, the number to keep per token on average, may be traced.
    """
    highest_1x1 = _highest(values_BxF).max(keepdims=True)
    keep = jnp.asarray(k, jnp.int32) * values_BxF.shape[0]
    # Of fewer tokens a sample would be too small to enclose the threshold of all.
    if values_BxF.shape[0] < _SAMPLED * _SAMPLED:
        return _search(values_BxF, keep, jnp.zeros_like(highest_1x1), highest_1x1, _count_all)
    low_1x1, high_1x1, above = _bracket(values_BxF, keep, highest_1x1)
    return _search(values_BxF, keep, low_1x1, high_1x1, _count_all, above)


def _bracket(
    values_BxF: jax.Array, keep: jax.Array, highest_1x1: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Return close bounds of the threshold, and the numbers of values above each, from some of the tokens.

    The share of values above a threshold differs little between samples of tokens, so the thresholds of a little more
    and of a little less of it in a sample nearly always enclose that of all; where they do not, a bound is 0 or the
    highest value.
    """
    sample_RxF, none_1x1 = values_BxF[::_SAMPLED], jnp.zeros_like(highest_1x1, jnp.int32)
    low_1x1, high_1x1, above_low_1x1, above_high_1x1 = jnp.zeros_like(highest_1x1), highest_1x1, none_1x1, none_1x1
    highest_of_sample_1x1 = _highest(sample_RxF).max(keepdims=True)
    for share in (1.05, 0.95):
        of_sample = (keep * (share * sample_RxF.shape[0] / values_BxF.shape[0])).astype(jnp.int32)
        guess_1x1 = _search(sample_RxF, of_sample, jnp.zeros_like(low_1x1), highest_of_sample_1x1, _count_all)
        above_1x1 = _count_all(values_BxF, guess_1x1)
        is_low, is_high = (above_1x1 >= keep) & (guess_1x1 > low_1x1), (above_1x1 < keep) & (guess_1x1 < high_1x1)
        low_1x1, high_1x1 = jnp.where(is_low, guess_1x1, low_1x1), jnp.where(is_high, guess_1x1, high_1x1)
        above_low_1x1 = jnp.where(is_low, above_1x1, above_low_1x1)
        above_high_1x1 = jnp.where(is_high, above_1x1, above_high_1x1)
    # Not counted again where it is known: passes over all values take nearly all of the time.
    above_low_1x1 = lax.cond(jnp.any(low_1x1 == 0), lambda: _count_all(values_BxF, low_1x1), lambda: above_low_1x1)
    return low_1x1, high_1x1, (above_low_1x1, above_high_1x1)


def kth_largest_below(acts_xF: jax.Array, k: int | jax.Array, max_k: int | None = None) -> jax.Array:
    """Return a threshold just below the k-th largest activation of each token.

    XLA's own top-k sorts, which on a CPU takes ten times as long as the matrix products of the step, and on a GPU as
    long as the step. Instead a threshold is searched above which k values lie. In the k blocks of features with the
    largest maxima lie the k largest values, so that only those blocks are looked at (on an H100, 2.4 ms for 8,192 rows
    of 32,768 values and k = 64; 10.4 ms if all values are counted). On TPUs, which gather slowly, all values are
    counted; the k-th largest of the maxima of the blocks is a lower bound.

    Args:
      acts_xF: not negative.
      k: number to keep; may be traced.
      max_k: the largest k there can be; k itself where that is a Python number.

    Returns:
      threshold_x1, such that ``acts > threshold`` keeps the k largest (all positive ones if fewer).
    """
    # At least float32: the search is on the bits of the floats.
    acts_xF = acts_xF.astype(jnp.promote_types(acts_xF.dtype, jnp.float32))
    max_k = min(int(k) if max_k is None else max_k, acts_xF.shape[-1])
    return _search_kth_largest(acts_xF, jnp.asarray(k, jnp.int32), max_k)


# Compiled once for all calls outside of a program, which would compile its loop anew in each.
@functools.partial(jax.jit, static_argnames="max_k", inline=True)
def _search_kth_largest(acts_xF: jax.Array, keep: jax.Array, max_k: int) -> jax.Array:
    """Return the threshold of ``kth_largest_below``."""
    features = acts_xF.shape[-1]
    if features % _BLOCK or max_k >= features // _BLOCK:
        highest_x1 = _highest(acts_xF)
        return _search(acts_xF, keep, jnp.zeros_like(highest_x1), highest_x1, _count_each)

    def all_blocks(acts_xF: jax.Array) -> jax.Array:
        maxima_xN = _maxima(_blocks(acts_xF))
        highest_x1 = maxima_xN.max(-1, keepdims=True)
        low_x1 = _search(maxima_xN, keep, jnp.zeros_like(highest_x1), highest_x1, _count_each)
        return _search(acts_xF, keep, low_x1, highest_x1, _count_each)

    def best_blocks(acts_xF: jax.Array) -> jax.Array:
        blocks_xNx16 = _blocks(acts_xF)
        largest_xK, block_xK = lax.top_k(_maxima(blocks_xNx16), max_k)
        chosen_xKx16 = jnp.take_along_axis(blocks_xNx16, block_xK[..., None], axis=-2, mode="promise_in_bounds")
        chosen = chosen_xKx16.reshape(*acts_xF.shape[:-1], -1)
        # Not by slices, which would keep XLA from taking its own top-k for the sort.
        low_x1, high_x1 = largest_xK.min(-1, keepdims=True), largest_xK.max(-1, keepdims=True)
        return _search(chosen, keep, low_x1, high_x1, _count_each)

    return lax.platform_dependent(acts_xF, tpu=all_blocks, default=best_blocks)


def k_largest(pre_BxF: jax.Array, k: int | jax.Array, max_k: int) -> tuple[jax.Array, jax.Array]:
    """Return the k largest positive pre-activations of each row, falling, and their positions, int32; both [B, max_k].

    Of equal values the first ones are taken. Values are 0, at arbitrary positions, where there are no more; k, from 1
    to ``max_k``, may be traced. XLA:CPU sorts the values of a few blocks faster than whole rows, and all lie in the
    blocks of the k largest maxima.
    """
    count, features = pre_BxF.shape
    if features % _BLOCK or max_k >= features // _BLOCK:
        value_BxK, position_BxK = lax.top_k(pre_BxF, max_k)
    else:
        blocks_BxNx16 = _blocks(pre_BxF)
        # Sorted, so that the first of equals is taken.
        block_BxK = jnp.sort(lax.top_k(_maxima(blocks_BxNx16), max_k)[1], axis=1)
        chosen_BxKx16 = jnp.take_along_axis(blocks_BxNx16, block_BxK[..., None], axis=1, mode="promise_in_bounds")
        value_BxK, at_BxK = lax.top_k(chosen_BxKx16.reshape(count, -1), max_k)
        position_BxK = jnp.take_along_axis(block_BxK, at_BxK // _BLOCK, axis=1) * _BLOCK + at_BxK % _BLOCK
    return jnp.where((jnp.arange(max_k)[None] < k) & (value_BxK > 0), value_BxK, 0.0), position_BxK


def _blocks(acts_xF: jax.Array) -> jax.Array:
    """Return the features in blocks, [..., F / 16, 16]."""
    return acts_xF.reshape(*acts_xF.shape[:-1], -1, _BLOCK)


def _search(
    acts: jax.Array,
    keep: jax.Array,
    low: jax.Array,
    high: jax.Array,
    count: Callable,
    above: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Search the largest threshold above which ``keep`` values lie, or more where they tie.

    The logarithm of the count falls about linearly with the threshold, so the next one to try is interpolated; the
    end that stays where it is loses half its weight each time (the Illinois rule), and every third interval is halved.
    Floats that are not negative order as their bits do, and it is the bits that are searched, so that it ends, ties
    included; it stops as soon as every threshold has exactly ``keep`` above it.

    Args:
      acts: not negative.
      keep: number of values that should lie above.
      low: a threshold at or above which that many lie.
      high: a threshold above which fewer lie.
      count: (acts, threshold) to the number above, of the threshold's shape, int32.
      above: numbers of values above ``low``, at least ``keep`` or all positive ones, and above ``high``. None: above
        ``high`` there is none, and values equal to ``low`` may be among those to keep.
    """
    integer = jnp.int64 if acts.dtype == jnp.float64 else jnp.int32
    to_bits = functools.partial(lax.bitcast_convert_type, new_dtype=integer)
    to_float = functools.partial(lax.bitcast_convert_type, new_dtype=acts.dtype)
    low_bits = to_bits(low)
    if above is None:
        # One below: values equal to ``low`` may be among those to keep, and have to lie above the threshold.
        low_bits = jnp.maximum(low_bits - 1, 0)
        above_low = count(acts, to_float(low_bits))
        above = above_low, jnp.zeros_like(above_low)

    def excess(above: jax.Array) -> jax.Array:  # 0 where it is ``keep``; the half is for counts of 0
        return jnp.log((above.astype(jnp.float32) + 0.5) / (keep.astype(jnp.float32) + 0.5))

    def is_open(carry):
        """Return whether a threshold has still too many values above it and can be raised."""
        low, high, above_low, *_ = carry
        return jnp.any((above_low > keep) & (high - low > 1))

    # Invariant: more than ``keep``, or all that can be told apart, lie above low; fewer above high.
    def narrow(carry):
        """Try one threshold between the bounds and move one of them there."""
        low, high, above_low, excess_low, excess_high, turn = carry
        share = jnp.where(turn % 3 == 2, 0.5, excess_low / (excess_low - excess_high))
        step = (share * (high - low).astype(jnp.float32)).astype(integer)
        middle = low + jnp.clip(step, 1, jnp.maximum(high - low - 1, 1))
        above = count(acts, to_float(middle))
        is_done = (above_low <= keep) | (high - low <= 1)  # leave that threshold where it is
        raise_low, lower_high = ~is_done & (above >= keep), ~is_done & (above < keep)
        return (
            jnp.where(raise_low, middle, low),
            jnp.where(lower_high, middle, high),
            jnp.where(raise_low, above, above_low),
            jnp.where(raise_low, excess(above), excess_low / 2),
            jnp.where(lower_high, excess(above), excess_high / 2),
            turn + 1,
        )

    start = low_bits, to_bits(high), above[0], *map(excess, above), jnp.int32(0)
    return to_float(lax.while_loop(is_open, narrow, start)[0])


def _count_each(acts_xF: jax.Array, threshold: jax.Array) -> jax.Array:
    """Count the values above a threshold, one of each token or one of all; [..., 1]."""
    # Floats, because XLA:CPU vectorises no sums of integers; exact up to 2^24 features.
    return over_last(jnp.sum, (acts_xF > threshold).astype(jnp.float32)).astype(jnp.int32)


def _highest(acts_xF: jax.Array) -> jax.Array:
    """Return the largest value of each token, [..., 1]."""
    return over_last(jnp.max, acts_xF)


def _maxima(blocks_xNx16: jax.Array) -> jax.Array:
    """Return the largest value of each block, [..., N]."""
    return over_last(jnp.max, blocks_xNx16, 4)[..., 0]


def _count_all(acts_BxF: jax.Array, threshold_1x1: jax.Array) -> jax.Array:
    """Count the values of all tokens above one threshold, up to 2^30 of them; [1, 1]."""
    above_Bx1 = _count_each(acts_BxF, threshold_1x1)
    count_1x1 = jnp.sum(above_Bx1, axis=0, keepdims=True, dtype=jnp.int32)
    if acts_BxF.size <= _MOST:
        return count_1x1
    # Of 65,536 tokens and as many features the number would overflow, and be less than any that is to be kept. Not for
    # smaller batches: XLA:CPU counts once for each of the sums.
    is_more_1x1 = jnp.sum(above_Bx1.astype(jnp.float32), axis=0, keepdims=True) > _MOST
    return jnp.where(is_more_1x1, _MOST, count_1x1)

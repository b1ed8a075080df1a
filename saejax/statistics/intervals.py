"""Averages and shares with 95 % intervals: percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) and Wilson's.

Prompts are drawn again with replacement, the statistic is computed on every such resample, and the interval runs
from its 2.5 % to its 97.5 % quantile. It says how much the figure would change with other prompts of the same kind; of
something that is the same for every prompt, such as 20 correct answers out of 20, it has no width, although with 20
prompts an error rate of up to 14 % would still give that in one sample of twenty. Shares of prompts therefore have
score intervals (``wilson``).
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.special import ndtri

from saejax.results import Interval
from saejax.statistics.bootstrap import percentile_interval

RESAMPLES = 10_000  # more would move ends of intervals by less than a tenth of their distance
_CHUNK = 8_000_000  # numbers held at once: 64 MB
_Z = float(ndtri(0.975))


def bootstrap(
    values_N: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> Interval:
    """Return the interval of any statistic of one value per prompt.

    Args:
      values_N: one finite number per prompt, at least one. Paired values go in as their differences.
      statistic: maps [R, N] to [R], each row by itself.
      resamples: how many, at least 1.
      seed: of the resampling; the same for two statistics of the same prompts gives both the same resamples.

    Raises:
      ValueError: there is no value, or one is not finite.
    """
    values_N = np.asarray(values_N, np.float64)
    if values_N.ndim != 1 or not len(values_N) or not np.isfinite(values_N).all():
        raise ValueError(f"expected finite numbers in one dimension, at least one: got {values_N!r}")
    n, rng = len(values_N), np.random.default_rng(seed)
    rows = max(1, _CHUNK // (4 * n))  # places, values, and what the statistic makes of them
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    # In chunks: all resamples of a large benchmark at once would take gigabytes.
    drawn_R = np.concatenate([statistic(values_N[rng.integers(n, size=(size, n))]) for size in sizes])
    return Interval(float(statistic(values_N[None, :])[0]), *percentile_interval(drawn_R))


def bootstrap_mean(values_N: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Return the mean over prompts and its interval; see ``bootstrap``."""
    return bootstrap(values_N, lambda values_RxN: values_RxN.mean(axis=1), resamples, seed)


def wilson(right_N: np.ndarray) -> Interval:
    """Return a share, and its 95 % score interval (Wilson, 1927), which has a width even where the share is 0 or 1.

    With z = 1.96 the ends are the shares p for which |share - p| = z sqrt(p (1 - p) / size).

    Args:
      right_N: True or 1 for what the share counts, at least one value.
    """
    return wilson_of(float(np.mean(right_N)), len(right_N))


def wilson_of(share: float, n: float) -> Interval:
    """Return a share of n independent ones, and its 95 % score interval, as ``wilson``."""
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # Rounding must not push an end past the share itself, at 0 and 1.
    return Interval(share, min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share))

"""Averages over prompts, with 95 % percentile bootstrap intervals (Efron and Tibshirani, 1993, chapter 13).

Prompts are drawn again with replacement, the statistic is computed on every such resample, and the interval runs
from its 2.5 % to its 97.5 % quantile. It says how much the figure would change with other prompts of the same kind; of
something that is the same for every prompt, such as 20 correct answers out of 20, it has no width, although with 20
prompts an error rate of up to 14 % would still give that in one sample of twenty.
"""

from collections.abc import Callable

import numpy as np

from saejax.results import Interval

SEPARATION_LIMIT = 1e6  # stands for infinity, which JSON does not have
_CHUNK = 2_000_000  # values resampled at once: 16 MB


def bootstrap(
    values_N: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> Interval:
    """The interval of any statistic of one value per prompt.

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
    rows = max(1, _CHUNK // n)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    drawn_R = np.concatenate([statistic(values_N[rng.integers(n, size=(size, n))]) for size in sizes])
    low, high = np.quantile(drawn_R, (0.025, 0.975))
    return Interval(float(statistic(values_N[None, :])[0]), float(low), float(high))


def bootstrap_mean(values_N: np.ndarray, resamples: int, seed: int) -> Interval:
    """The mean over prompts and its interval; see ``bootstrap``."""
    return bootstrap(values_N, _mean, resamples, seed)


def bootstrap_separation(values_N: np.ndarray, resamples: int, seed: int) -> Interval:
    """The separation over prompts and its interval; see ``separation`` and ``bootstrap``."""
    return bootstrap(values_N, separation, resamples, seed)


def bootstrap_difference(first_N: np.ndarray, second_N: np.ndarray, resamples: int, seed: int) -> Interval:
    """The mean of first minus second over the same prompts, resampled in pairs."""
    if np.shape(first_N) != np.shape(second_N):
        raise ValueError(f"paired values have shapes {np.shape(first_N)} and {np.shape(second_N)}: expected the same")
    return bootstrap_mean(np.subtract(first_N, second_N, dtype=np.float64), resamples, seed)


def separation(values_RxN: np.ndarray) -> np.ndarray:
    """Mean over (population) standard deviation of each row, [R], cut at plus and minus ``SEPARATION_LIMIT``.

    Where all values of a row are equal, one value included, the deviation is 0: the separation is then the limit
    with the sign of the mean, and 0 if they are all 0.
    """
    mean_R, spread_R = _mean(values_RxN), values_RxN.std(axis=1)
    limit_R = np.sign(mean_R) * SEPARATION_LIMIT
    ratio_R = np.divide(mean_R, spread_R, out=limit_R, where=spread_R > 0)
    # Of equal numbers the rounded deviation may be a last bit above 0; that is cut to the limit, too.
    return np.clip(ratio_R, -SEPARATION_LIMIT, SEPARATION_LIMIT)


def _mean(values_RxN: np.ndarray) -> np.ndarray:
    return values_RxN.mean(axis=1)

"""Bootstrap over prompts within strata (templates): intervals, p-values and equivalence tests of means.

Prompts are resampled within their stratum and never the strata: with three templates there is nothing to resample, and
the cluster bootstrap over them covers 76 to 92 % instead of 95 %. What a mean then speaks about is prompts like these
of these templates. Whether an effect holds beyond them is shown otherwise: by its sign in every template, the held-out
one included (``has_same_sign``).

From a stratum of n prompts n - 1 are drawn, so that the variance of a mean is estimated without bias (McCarthy and
Snowden, The bootstrap and finite population sampling, 1985). Intervals and p-values follow Davison and Hinkley
(Bootstrap Methods and their Application, 1997, sections 3.2, 4.2 and 5.3), equivalence tests follow Schuirmann (A
comparison of the two one-sided tests procedure and the power approach, 1987).
"""

from collections.abc import Sequence

import numpy as np


def resampling_weights(strata: Sequence[object] | np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the weight of each prompt in each bootstrap sample of a mean.

    From a stratum of n prompts n - 1 are drawn with replacement, and the stratum keeps its share n / P of the mean.
    Strata of a single prompt are joined into one, which joins the largest stratum if it is still alone. A single prompt
    is the mean in every sample.

    Args:
      strata: label of each of the P prompts, at least one.
      resamples: number of samples, at least 1.
      seed: seed of the draws.

    Returns:
      Float64 array ``[resamples, P]``, rows sum to 1: ``weights @ values`` are the samples of the mean.

    Raises:
      ValueError: there is no prompt.
    """
    _, label_P, size_S = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    count, size_P = len(label_P), size_S[label_P]
    if not count:
        raise ValueError("expected at least one prompt to resample, got none")
    if count == 1:
        return np.ones((resamples, 1))
    # From a stratum of one prompt n - 1 = 0 prompts would be drawn: it would have no weight in any sample.
    is_alone_P = size_P == 1
    label_P = np.where(is_alone_P, -1, label_P)
    if is_alone_P.sum() == 1:
        label_P = np.where(is_alone_P, label_P[np.argmax(size_P)], label_P)
    rng = np.random.default_rng(seed)
    weight_RxP = np.empty((resamples, count))
    for label in np.unique(label_P):
        inside_P = label_P == label
        size = int(inside_P.sum())
        drawn_RxQ = rng.multinomial(size - 1, np.full(size, 1 / size), size=resamples)
        # The n - 1 draws count for n prompts, so that every sample weights strata as the data does.
        weight_RxP[:, inside_P] = drawn_RxQ * (size / (size - 1) / count)
    return weight_RxP


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap samples.

    Args:
      samples: samples of the statistic, ``[R]``.
      level: coverage, in (0, 1).

    Returns:
      The lower and the upper end.
    """
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def two_sided_p(samples: np.ndarray) -> float:
    """Return the two-sided p-value of a statistic being 0, by inverting its percentile interval.

    p = 2 min((1 + #{samples <= 0}) / (1 + R), (1 + #{samples >= 0}) / (1 + R)), at most 1.

    Args:
      samples: bootstrap samples of the statistic, ``[R]``.
    """
    below, above = np.sum(samples <= 0), np.sum(samples >= 0)
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(samples))))


def non_inferiority_p(samples: np.ndarray, margin: float) -> float:
    """Return the p-value of a statistic being at or above ``margin``: one of the two one-sided tests of equivalence.

    p = 2 (1 + #{samples >= margin}) / (1 + R), at most 1. The factor 2 makes p <= 0.05 the same as an upper end of the
    95 % interval below the margin, which is stricter than the usual one-sided 5 %.

    Args:
      samples: bootstrap samples of the statistic, ``[R]``.
      margin: the largest value that still counts as no effect.
    """
    return float(min(1.0, 2 * (1 + np.sum(samples >= margin)) / (1 + len(samples))))


def is_equivalent(interval: tuple[float, float], margin: float) -> bool:
    """Return whether an interval lies within +- ``margin`` (inclusive)."""
    return -margin <= interval[0] and interval[1] <= margin


def stratum_means(values: np.ndarray, strata: Sequence[object] | np.ndarray) -> dict[str, float]:
    """Return the mean of ``values`` ``[P]`` in each stratum, by its label, in the order of the labels."""
    strata_P = np.asarray(strata)
    return {str(label): float(np.mean(values[strata_P == label])) for label in np.unique(strata_P)}


def has_same_sign(means: Sequence[float] | np.ndarray) -> bool:
    """Return whether all means are above zero or all below; False where one is zero or there is none."""
    signs = np.sign(np.asarray(means, np.float64))
    return len(signs) > 0 and bool(np.all(signs == signs[0]) and signs[0] != 0)

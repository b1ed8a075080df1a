"""Is a set of features a circuit? The hypotheses of Shi et al., 2024 (arXiv 2410.13032), for features.

Let s be the logit difference on P test prompts: s_M with nothing removed, s_C with only the set's features kept, s_notC
with the set removed. A *kept* set means that every other feature of the dictionary that fires on the test prompts is
removed; what the dictionary does not explain (its error term) stays, as in every ablation here.

Of a circuit five things are claimed; q* is 0.9:

- equivalence: |P(s_C > s_M) + P(s_C = s_M) / 2 - 1/2| < 0.1, that is, the set alone does better as often as worse;
- independence: s_notC and s_M are independent;
- minimality: for every feature of the set, P(its removal changes s_C by more than that of a matched one) > q*;
- sufficiency: P(mean |s_C - s_M| is smaller than that of a random set) > q*;
- necessity: P(mean |s_notC - s_M| is larger than that of a random set) > q*.

A claim is *shown* where its opposite is rejected. Equivalence is shown by two one-sided tests (Schuirmann, 1987), so
that few prompts cannot show it; it is *refuted* where |...| <= 0.1 is rejected. Independence can be refuted only: a
test that does not reject shows nothing. What is neither is *inconclusive*. P-values of claims are corrected by Holm's
method for the four that can be shown; those that speak against a circuit are not, as a correction would make them
larger and the claim easier.

What differs from the paper: its null hypotheses of equivalence and of minimality are what is claimed here, so that few
prompts or draws would keep them; units are the features of one dictionary at one site, not edges; random sets are
matched one to one and drawn as the set would be, were it random (``controls.draw_alike``); and the features that
minimality adds are matched and not in the set.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from saejax.causal.statistics import holm, hsic

EPSILON = 0.1  # how far from one half the set may still beat the model
Q_STAR = 0.9  # the share of random features or sets that must be beaten
LEVEL = 0.05  # largest p-value of a rejection
PERMUTATIONS = 1000
TESTS = ("equivalence", "independence", "minimality", "sufficiency", "necessity")


class Outcome(NamedTuple):
    """Of a claim: its statistic, the p-value of its opposite, and that of a test against it; None: no such test."""

    statistic: float
    p_value: float | None
    p_against: float | None = None


def equivalence(clean_P: np.ndarray, kept_P: np.ndarray) -> Outcome:
    """Whether A = P(s_C > s_M) + P(s_C = s_M) / 2 lies within ``EPSILON`` of 1/2.

    The estimate of A is the mean over prompts of 1, 1/2 or 0. The p-values are binomial ones of their sum, a half
    rounded against the rejection; ties only make the sum vary less.

    Args:
      clean_P, kept_P: the score s of each prompt with all features, and with the circuit's alone; finite.

    Returns:
      Statistic A; ``p_value`` of |A - 1/2| >= ``EPSILON``, the larger of two one-sided tests; ``p_against`` of
      |A - 1/2| <= ``EPSILON``, twice the smaller of two.
    """
    n = len(_finite(clean_P))
    score = float(np.where(_finite(kept_P) == clean_P, 0.5, kept_P > clean_P).sum())

    def as_low(share: float) -> float:
        return float(binom.cdf(np.ceil(score), n, share))

    def as_high(share: float) -> float:
        return float(binom.sf(np.floor(score) - 1, n, share))

    low, high = 0.5 - EPSILON, 0.5 + EPSILON
    against = 2 * min(as_low(low), as_high(high))
    return Outcome(score / n, max(as_low(high), as_high(low)), min(against, 1.0))


def independence(clean_P: np.ndarray, removed_P: np.ndarray, seed: int) -> Outcome:
    """Whether s_notC and s_M are independent; HSIC with Gaussian kernels, see ``statistics.hsic``. Refuted, or not."""
    statistic, p_value = hsic(clean_P, removed_P, PERMUTATIONS, seed)
    return Outcome(statistic, None, p_value)


def minimality(change_K: np.ndarray, random_change_NxK: np.ndarray) -> tuple[Outcome, np.ndarray]:
    """Of every feature i: whether P(change_i > change of a matched added feature) > ``Q_STAR``.

    A *change* is the mean over prompts of |s without the feature - s with it|. N features matched to i were each added
    to the set by itself and removed again. The statistic of i is how many of those its change exceeds, k_i, and
    p_i = P(K >= k_i), K binomial (N, ``Q_STAR``). All features are minimal only if each is: p = max p_i, which needs no
    correction (an intersection-union test; Berger, 1982).

    Args:
      change_K, random_change_NxK: of each feature, and of the N matched to it.

    Returns:
      The set's outcome, its statistic the share of features with p_i <= 0.05 after Holm's correction; and p_i, [K].
    """
    change_K, random_change_NxK = _finite(change_K), _finite(random_change_NxK)
    beaten_K = (change_K[None, :] > random_change_NxK).sum(axis=0)
    p_K = binom.sf(beaten_K - 1, len(random_change_NxK), Q_STAR)
    return Outcome(float((holm(p_K) <= LEVEL).mean()), float(p_K.max())), p_K


def sufficiency(clean_P: np.ndarray, kept_P: np.ndarray, random_kept_NxP: np.ndarray) -> Outcome:
    """Whether P(mean |s_C - s_M| < that of a random set kept alone) > ``Q_STAR``; see ``_beaten``."""
    return _beaten(-apart(clean_P, kept_P), -apart(clean_P, random_kept_NxP))


def necessity(clean_P: np.ndarray, removed_P: np.ndarray, random_removed_NxP: np.ndarray) -> Outcome:
    """Whether P(mean |s_notC - s_M| > that of a random set removed) > ``Q_STAR``; see ``_beaten``."""
    return _beaten(apart(clean_P, removed_P), apart(clean_P, random_removed_NxP))


def _beaten(own: np.ndarray, random_N: np.ndarray) -> Outcome:
    """The share k / N of random values below one's own (equal ones are not), and P(K >= k), K as in ``minimality``."""
    k = int((own > random_N).sum())
    return Outcome(k / len(random_N), float(binom.sf(k - 1, len(random_N), Q_STAR)))


def apart(clean_P: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean over prompts, the last axis, of the absolute difference of the ``other`` scores from the clean ones."""
    return np.abs(_finite(other) - _finite(clean_P)).mean(axis=-1)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected finite scores, at least one: got an array {values.shape}")
    return values

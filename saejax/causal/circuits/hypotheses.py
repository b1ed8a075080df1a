"""Is a set of features a circuit? The hypothesis tests of Shi et al., 2024 (arXiv 2410.13032), for features.

Let s be the logit difference on P test prompts: s_M with nothing removed, s_C with only the set's features kept, s_notC
with the set removed. A *kept* set means that every other feature of the dictionary that fires on the test prompts is
removed; what the dictionary does not explain (its error term) stays, as in every ablation here.

The null hypotheses, of which a circuit keeps the first two and rejects the others; q* is 0.9:

- equivalence: |P(s_C > s_M) - 1/2| <= 0.1, that is, the set alone does better as often as worse;
- independence: s_notC and s_M are independent;
- minimality: for some feature of the set, P(its removal changes s_C by more than that of a random added one) <= q*;
- sufficiency: P(mean |s_C - s_M| is smaller than that of a random set) <= q*;
- necessity: P(mean |s_notC - s_M| is larger than that of a random set) <= q*.

A null hypothesis that is kept is not shown to be true: few prompts keep almost any. P-values are corrected for five
tests by Holm's method. What differs from the paper: units are the features of one dictionary at one site, not edges;
prompts that tie leave the test of equivalence; the random sets of sufficiency and (partial) necessity are matched one
to one (``controls``) and share no feature with the set; and a feature must show that it
is minimal, where the paper's null hypothesis is that it is, so that too few draws cannot make a set minimal.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from saejax.causal.statistics import holm, hsic

EPSILON = 0.1  # how far from one half the set may still beat the model
Q_STAR = 0.9  # the share of random features or sets that must be beaten
LEVEL = 0.05  # largest corrected p-value of a rejection
PERMUTATIONS = 1000
REJECTED_BY_A_CIRCUIT = dict(equivalence=False, independence=False, minimality=True, sufficiency=True, necessity=True)


class Outcome(NamedTuple):
    """Of a test: its statistic (None where nothing defines it) and the p-value of its null hypothesis."""

    statistic: float | None
    p_value: float


def equivalence(clean_P: np.ndarray, kept_P: np.ndarray, epsilon: float = EPSILON) -> Outcome:
    """H0: |P(s_C > s_M given that they differ) - 1/2| <= epsilon.

    Prompts on which the scores are equal are left out, as in the sign test. Of the n others k have s_C > s_M, and the
    p-value is the largest over the null hypothesis of P(|K - n/2| >= |k - n/2|), K binomial. The derivative of that
    probability has the sign of P(s_C > s_M) - 1/2, so it is largest at the interval's end, 1/2 + epsilon.

    Returns:
      Statistic k / n; with n = 0 there is none, and p = 1.
    """
    differs_P = _finite(kept_P) != _finite(clean_P)
    n, k = int(differs_P.sum()), int((kept_P > clean_P)[differs_P].sum())
    if not n:
        return Outcome(None, 1.0)
    fewer, most = min(k, n - k), 0.5 + epsilon
    both = binom.cdf(fewer, n, most) + binom.sf(n - fewer - 1, n, most)
    return Outcome(k / n, min(float(both), 1.0))


def independence(clean_P: np.ndarray, removed_P: np.ndarray, seed: int) -> Outcome:
    """H0: s_notC and s_M are independent; HSIC with Gaussian kernels, see ``statistics.hsic``."""
    return Outcome(*hsic(clean_P, removed_P, PERMUTATIONS, seed))


def minimality(change_K: np.ndarray, random_change_N: np.ndarray, q_star: float = Q_STAR) -> tuple[Outcome, np.ndarray]:
    """H0 of feature i: P(change_i > change of a random added feature) <= q_star; of the set: that of some feature.

    A *change* is the mean over prompts of |s without the feature - s with it|. N random features were each added to the
    set by itself and removed again. Of feature i the statistic is how many of those its change exceeds, k_i, and
    p_i = P(K >= k_i), K binomial (N, q_star). All features are minimal only if each is: p = max p_i, which needs no
    correction (an intersection-union test; Berger, 1982).

    Returns:
      The set's outcome, its statistic the share of features with p_i <= 0.05 after Holm's correction; and p_i, [K].
    """
    change_K, random_change_N = _finite(change_K), _finite(random_change_N)
    beaten_K = (change_K[:, None] > random_change_N[None, :]).sum(axis=1)
    p_K = binom.sf(beaten_K - 1, len(random_change_N), q_star)
    return Outcome(float((holm(p_K) <= LEVEL).mean()), float(p_K.max())), p_K


def sufficiency(
    clean_P: np.ndarray, kept_P: np.ndarray, random_kept_NxP: np.ndarray, q_star: float = Q_STAR
) -> Outcome:
    """H0: P(mean |s_C - s_M| < that of a random set kept alone) <= q_star; see ``_beaten``."""
    return _beaten(-apart(clean_P, kept_P), -apart(clean_P, random_kept_NxP), q_star)


def necessity(
    clean_P: np.ndarray, removed_P: np.ndarray, random_removed_NxP: np.ndarray, q_star: float = Q_STAR
) -> Outcome:
    """H0: P(mean |s_notC - s_M| > that of a random set removed) <= q_star; see ``_beaten``."""
    return _beaten(apart(clean_P, removed_P), apart(clean_P, random_removed_NxP), q_star)


def _beaten(own: np.ndarray, random_N: np.ndarray, q_star: float) -> Outcome:
    """The share k / N of random values below one's own (equal ones are not), and P(K >= k), K binomial (N, q_star)."""
    k = int((own > random_N).sum())
    return Outcome(k / len(random_N), float(binom.sf(k - 1, len(random_N), q_star)))


def apart(clean_P: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean over prompts, the last axis, of the absolute difference."""
    return np.abs(_finite(other) - _finite(clean_P)).mean(axis=-1)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected finite scores, at least one: got an array {values.shape}")
    return values

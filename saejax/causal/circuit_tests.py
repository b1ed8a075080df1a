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
to one in firing rate and activation (``controls``) and share no feature with the set; and a feature must show that it
is minimal, where the paper's null hypothesis is that it is, so that too few draws cannot make a set minimal.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.stats import binom

from saejax.causal.ablation import LogitDiffs
from saejax.causal.controls import FeatureStatistics, draw_controls
from saejax.causal.statistics import holm, hsic
from saejax.settings import AblateConfig

EPSILON = 0.1  # how far from one half the set may still beat the model
Q_STAR = 0.9  # the share of random features or sets that must be beaten
LEVEL = 0.05  # largest corrected p-value of a rejection
DRAWS = 100  # random sets, and random added features
PERMUTATIONS = 1000
REJECTED_BY_A_CIRCUIT = dict(equivalence=False, independence=False, minimality=True, sufficiency=True, necessity=True)


class Experiment(Protocol):
    """What is measured on the test prompts of a behaviour."""

    def statistics(self) -> FeatureStatistics:
        """How often and how strongly the features fire."""

    def ablate(self, sets: Sequence[Sequence[int]]) -> LogitDiffs:
        """The logit difference of each prompt without each set of features."""


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
    return _beaten(-_apart(clean_P, kept_P), -_apart(clean_P, random_kept_NxP), q_star)


def necessity(
    clean_P: np.ndarray, removed_P: np.ndarray, random_removed_NxP: np.ndarray, q_star: float = Q_STAR
) -> Outcome:
    """H0: P(mean |s_notC - s_M| > that of a random set removed) <= q_star; see ``_beaten``."""
    return _beaten(_apart(clean_P, removed_P), _apart(clean_P, random_removed_NxP), q_star)


def _beaten(own: np.ndarray, random_N: np.ndarray, q_star: float) -> Outcome:
    """The share k / N of random values below one's own (equal ones are not), and P(K >= k), K binomial (N, q_star)."""
    k = int((own > random_N).sum())
    return Outcome(k / len(random_N), float(binom.sf(k - 1, len(random_N), q_star)))


def _apart(clean_P: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean over prompts, the last axis, of the absolute difference."""
    return np.abs(_finite(other) - _finite(clean_P)).mean(axis=-1)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected finite scores, at least one: got an array {values.shape}")
    return values


@dataclasses.dataclass(frozen=True)
class Scores:
    """The logit differences that the tests rest on.

    Attributes:
      clean_P: with nothing removed.
      kept_P, removed_P: with only the set kept, and with the set removed.
      random_kept_NxP, random_removed_NxP: the same of each random set.
      lesser_KxP: with only the set kept but for one feature, for each that fires.
      inflated_NxP: with only the set and one random feature kept.
    """

    clean_P: np.ndarray
    kept_P: np.ndarray
    removed_P: np.ndarray
    random_kept_NxP: np.ndarray
    random_removed_NxP: np.ndarray
    lesser_KxP: np.ndarray
    inflated_NxP: np.ndarray

    @property
    def by_kind(self) -> dict[str, np.ndarray]:
        """All but the clean ones, by short names, prompts last."""
        return dict(
            kept=self.kept_P,
            removed=self.removed_P,
            random_kept=self.random_kept_NxP,
            random_removed=self.random_removed_NxP,
            lesser=self.lesser_KxP,
            inflated=self.inflated_NxP,
        )


def test_circuit(experiment: Experiment, features: Sequence[int], config: AblateConfig) -> tuple[dict, Scores | None]:
    """Measures a set of features and applies the five tests.

    Features that fire on no test prompt cannot change anything: they are not minimal, and no random set matches them.
    Where none of the set fires, nothing is tested and every figure is None.

    Args:
      experiment: what to measure with.
      features: distinct.
      config: of the stage; its ``seed`` and ``matches`` are used.

    Returns:
      For JSON: ``n``, ``firing``, the mean logit differences ``clean``, ``kept`` and ``removed``; ``tests`` (name ->
      ``statistic``, ``p_value``, ``p_holm``, ``rejected`` at the level of 0.05 after Holm's correction, ``verdict``:
      whether that is what a circuit does); ``features`` (``feature``, ``change``, ``p_value``, ``p_holm``,
      ``minimal``). And what it was derived from.

    Raises:
      UserError: too few other features fire for matched controls, or something is not finite.
    """
    statistics = experiment.statistics()
    fires_F = statistics.fires_at_all_F
    members = [int(feature) for feature in features if fires_F[feature]]
    said: dict[str, Any] = dict(n=len(features), firing=len(members))
    if not members:
        nothing = dict.fromkeys(("statistic", "p_value", "p_holm", "rejected", "verdict"))
        return said | dict(
            clean=None, kept=None, removed=None, tests={name: nothing for name in REJECTED_BY_A_CIRCUIT}, features=[]
        ), None
    scores = _measure(experiment, statistics, members, config)
    change_K = np.zeros(len(features))
    change_K[fires_F[list(features)]] = _apart(scores.kept_P, scores.lesser_KxP)
    smallest, p_K = minimality(change_K, _apart(scores.kept_P, scores.inflated_NxP))
    outcomes = dict(
        equivalence=equivalence(scores.clean_P, scores.kept_P),
        independence=independence(scores.clean_P, scores.removed_P, config.seed),
        minimality=smallest,
        sufficiency=sufficiency(scores.clean_P, scores.kept_P, scores.random_kept_NxP),
        necessity=necessity(scores.clean_P, scores.removed_P, scores.random_removed_NxP),
    )
    corrected = holm(np.array([outcome.p_value for outcome in outcomes.values()])).tolist()
    by_feature = zip(features, change_K.tolist(), p_K.tolist(), holm(p_K).tolist(), strict=True)
    return said | dict(
        clean=float(scores.clean_P.mean()),
        kept=float(scores.kept_P.mean()),
        removed=float(scores.removed_P.mean()),
        tests={
            name: outcome._asdict()
            | dict(p_holm=p, rejected=p <= LEVEL, verdict=(p <= LEVEL) == REJECTED_BY_A_CIRCUIT[name])
            for (name, outcome), p in zip(outcomes.items(), corrected, strict=True)
        },
        features=[
            dict(feature=int(feature), change=change, p_value=p, p_holm=adjusted, minimal=adjusted <= LEVEL)
            for feature, change, p, adjusted in by_feature
        ],
    ), scores


def _measure(
    experiment: Experiment, statistics: FeatureStatistics, members: Sequence[int], config: AblateConfig
) -> Scores:
    firing_C = np.flatnonzero(statistics.fires_at_all_F)
    random_NxK = draw_controls(statistics, members, DRAWS, config.matches, seed=[config.seed, len(members)])
    rng = np.random.default_rng([config.seed, DRAWS])
    added_U, added_N = np.unique(rng.choice(np.setdiff1d(firing_C, members), DRAWS), return_inverse=True)

    def all_but(kept: Sequence[int] | np.ndarray) -> list[int]:
        return np.setdiff1d(firing_C, kept).tolist()

    diffs = experiment.ablate(
        [
            all_but(members),
            members,
            *(all_but(random_K) for random_K in random_NxK),
            *random_NxK.tolist(),
            *(all_but([other for other in members if other != member]) for member in members),
            *(all_but([*members, added]) for added in added_U),
        ]
    )
    clean_P = diffs.clean_P
    # What differs by rounding alone does not differ.
    differs_SxP = np.abs(diffs.drop_SxP) > 4 * diffs.rounding_P[None, :]
    score_SxP = np.where(differs_SxP, diffs.ablated_SxP, clean_P[None, :])
    ends = np.cumsum([1, 1, DRAWS, DRAWS, len(members)])
    kept_1xP, removed_1xP, random_kept, random_removed, lesser, inflated_UxP = np.split(score_SxP, ends)
    return Scores(
        clean_P, kept_1xP[0], removed_1xP[0], random_kept, random_removed, lesser, inflated_UxP[added_N.reshape(-1)]
    )

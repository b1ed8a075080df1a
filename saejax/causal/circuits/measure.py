"""A set of features measured as a circuit: kept alone, removed, without each of its features, beside random sets."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.causal.circuits import hypotheses
from saejax.causal.circuits.results import Answer, CircuitFeature, CircuitResult, CircuitTest
from saejax.causal.controls import draw_alike, draw_controls, fitting_matches
from saejax.causal.experiment import Experiment
from saejax.causal.statistics import holm
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.settings import AblateConfig

DRAWS = 100  # random sets, and features added for each of the set's


@dataclasses.dataclass(frozen=True)
class CircuitDiffs:
    """The logit differences that the tests rest on.

    Attributes:
      clean_P: with nothing removed.
      kept_P, removed_P: with only the set kept, and with the set removed.
      random_kept_NxP, random_removed_NxP: the same of each random set.
      lesser_KxP: with only the set kept but for one feature, for each that fires.
      inflated_UxP: with only the set and one other feature kept, for each of those that were drawn.
      added_NxK: which of these U the draws match to each feature that fires.
    """

    clean_P: np.ndarray
    kept_P: np.ndarray
    removed_P: np.ndarray
    random_kept_NxP: np.ndarray
    random_removed_NxP: np.ndarray
    lesser_KxP: np.ndarray
    inflated_UxP: np.ndarray
    added_NxK: np.ndarray

    @property
    def by_kind(self) -> dict[str, np.ndarray]:
        """All but the clean ones, by short names, prompts last."""
        return dict(
            kept=self.kept_P,
            removed=self.removed_P,
            random_kept=self.random_kept_NxP,
            random_removed=self.random_removed_NxP,
            lesser=self.lesser_KxP,
            inflated=self.inflated_UxP,
        )


def test_circuit(
    experiment: Experiment, features: Sequence[int], config: AblateConfig
) -> tuple[CircuitResult, CircuitDiffs | None]:
    """Measures a set of features and applies the five tests (``hypotheses``).

    Features that fire on no test prompt cannot change anything: they are not minimal, and no random set matches them.
    Where none of the set fires, nothing is tested and every figure is None.

    Args:
      features: distinct.
      config: of the stage; its ``seed`` and ``matches`` are used.

    Returns:
      The outcomes, and what they were derived from.

    Raises:
      UserError: too few other features fire for matched controls, or something is not finite.
    """
    statistics = experiment.statistics()
    fires_F = statistics.fires_at_all_F
    members = [int(feature) for feature in features if fires_F[feature]]
    if not members:
        tests = dict.fromkeys(hypotheses.TESTS, CircuitTest(None, None, None, None, None))
        return CircuitResult(len(features), 0, clean=None, kept=None, removed=None, tests=tests, features=()), None
    scores = _measure(experiment, statistics, members, config)
    fires_K = fires_F[list(features)]
    # A feature that never fires has no matched one, and changes nothing: it beats none.
    change_K, random_change_NxK = np.zeros(len(features)), np.zeros((DRAWS, len(features)))
    change_K[fires_K] = hypotheses.apart(scores.kept_P, scores.lesser_KxP)
    random_change_NxK[:, fires_K] = hypotheses.apart(scores.kept_P, scores.inflated_UxP)[scores.added_NxK]
    smallest, p_K = hypotheses.minimality(change_K, random_change_NxK)
    by_feature = zip(features, change_K.tolist(), p_K.tolist(), holm(p_K).tolist(), strict=True)
    return CircuitResult(
        n=len(features),
        firing=len(members),
        clean=float(scores.clean_P.mean()),
        kept=float(scores.kept_P.mean()),
        removed=float(scores.removed_P.mean()),
        tests=_answered(scores, smallest, config),
        features=tuple(
            CircuitFeature(int(feature), change, p_value, adjusted, minimal=adjusted <= hypotheses.LEVEL)
            for feature, change, p_value, adjusted in by_feature
        ),
    ), scores


def _answered(scores: CircuitDiffs, smallest: hypotheses.Outcome, config: AblateConfig) -> dict[str, CircuitTest]:
    """The answers to all claims, given the outcome of minimality."""
    outcomes = dict(
        equivalence=hypotheses.equivalence(scores.clean_P, scores.kept_P),
        independence=hypotheses.independence(scores.clean_P, scores.removed_P, config.seed),
        minimality=smallest,
        sufficiency=hypotheses.sufficiency(scores.clean_P, scores.kept_P, scores.random_kept_NxP),
        necessity=hypotheses.necessity(scores.clean_P, scores.removed_P, scores.random_removed_NxP),
    )
    claims = {name: outcome.p_value for name, outcome in outcomes.items() if outcome.p_value is not None}
    corrected = dict(zip(claims, holm(np.array(list(claims.values()))).tolist(), strict=True))
    return {name: _answer(outcome, corrected.get(name)) for name, outcome in outcomes.items()}


def _answer(outcome: hypotheses.Outcome, p_holm: float | None) -> CircuitTest:
    shown = p_holm is not None and p_holm <= hypotheses.LEVEL
    refuted = outcome.p_against is not None and outcome.p_against <= hypotheses.LEVEL
    answer: Answer = "shown" if shown else "refuted" if refuted else "inconclusive"
    return CircuitTest(outcome.statistic, outcome.p_value, p_holm, outcome.p_against, answer)


def _measure(
    experiment: Experiment, statistics: FeatureStatistics, members: Sequence[int], config: AblateConfig
) -> CircuitDiffs:
    firing_C = np.flatnonzero(statistics.fires_at_all_F)
    matches = fitting_matches(statistics, members, config.matches)
    seed = [config.seed, len(members)]
    random_NxK = draw_alike(statistics, members, DRAWS, matches, [*seed, 1])
    # What is added to the set must not be in it: another member would change nothing, and be beaten for nothing.
    others_NxK = draw_controls(statistics, members, DRAWS, matches, seed)
    added_U, added_NxK = np.unique(others_NxK, return_inverse=True)

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
    added_NxK = added_NxK.reshape(others_NxK.shape)
    return CircuitDiffs(
        clean_P, kept_1xP[0], removed_1xP[0], random_kept, random_removed, lesser, inflated_UxP, added_NxK
    )

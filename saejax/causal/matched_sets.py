"""The sets that stand beside a tested one: of matched features, and such as change the site by as much together."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from saejax.causal import controls
from saejax.causal.results import ControlMatch
from saejax.interventions.activity import FeatureStatistics

SPARE = 4  # sets drawn for each that is kept: those that change the site most nearly as much as the tested one


@dataclasses.dataclass(frozen=True)
class MatchedSets:
    """Sets of as many features as the tested one has.

    Attributes:
      controls_NxC: N sets of other features; column c is matched to the tested set's c-th feature.
      draws_MxC: M sets of other and tested features, which decide p-values; see ``claims``.
      match: how well the controls match.
      disjoint: how many sets of other features without one in common the pool holds.
    """

    controls_NxC: np.ndarray
    draws_MxC: np.ndarray
    match: ControlMatch
    disjoint: int


def draw_matched_sets(
    statistics: FeatureStatistics,
    features: Sequence[int],
    changes: Callable[[Sequence[int]], np.ndarray],
    counts: tuple[int, int],
    matches: int,
    seed: Sequence[int],
    advice: str,
    spare: int = SPARE,
) -> MatchedSets:
    """Draws controls and draws, and keeps those that change the site most nearly as much as the tested set does.

    Args:
      statistics: measured on the prompts and positions of the test.
      features: the tested ones, which fire there.
      changes: gives inner products of what removing each of K features changes at the site, [K, K].
      counts: how many controls and how many draws are kept.
      matches: how many nearest features each one is drawn from, or as many as there are.
      seed: of the draws.
      advice: what to do where too few other features fire.
      spare: sets drawn for each that is kept.

    Raises:
      TooFewControls: too few other features fire.
    """
    matches = controls.fitting_matches(statistics, features, matches)
    asked, drawn = (statistics, features), [spare * count for count in counts]
    controls_NxC = controls.draw_controls(*asked, drawn[0], matches, seed, advice)
    draws_MxC = controls.draw_alike(*asked, drawn[1], matches, [*seed, 1], advice)
    if not len(features):
        return MatchedSets(controls_NxC[: counts[0]], draws_MxC[: counts[1]], ControlMatch(None, None, None), 0)
    pool_K = np.unique([*features, *controls_NxC.ravel().tolist(), *draws_MxC.ravel().tolist()])
    change_KxK = changes(pool_K.tolist())
    (own,), controls_N, draws_M = (
        controls.joint_size(change_KxK, pool_K, sets)
        for sets in ([features], controls_NxC.tolist(), draws_MxC.tolist())
    )
    kept_S = controls.nearest_in_size(controls_N, float(own), counts[0])
    match = dataclasses.replace(
        controls.match_ratios(*asked, controls_NxC[kept_S]),  # of controls: draws may hold the features themselves
        size_ratio=float(np.median(controls_N[kept_S]) / own) if own else None,
    )
    kept_R = controls.nearest_in_size(draws_M, float(own), counts[1])
    return MatchedSets(controls_NxC[kept_S], draws_MxC[kept_R], match, controls.disjoint_sets(*asked, matches))

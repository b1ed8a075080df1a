"""Sets of features that grow: the top features one after the other, and sets grown greedily.

The *cumulative curve* removes the first 1, 2, 3, ... top features together, in the order of their attribution, beside
the first as many columns of the drawn control sets, which are matched to them one to one. A *greedy* set is grown on
train prompts by the measured effect of the whole set, so that features that matter only together, or that stand in for
each other, are told apart; test prompts judge it beside as many top features.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from saejax.causal.ablate.results import CumulativeCurve, CurvePoints, GreedySet
from saejax.causal.ablate.verdict import JudgedDiffs
from saejax.causal.experiment import Experiment
from saejax.interventions import slopes as screening
from saejax.results import Interval
from saejax.settings import AblateConfig
from saejax.tasks.scoring import bootstrap_mean, wilson

SIZES, CONTROL_SIZES = 20, 8  # most sizes on a curve, of the top features and of their controls
DRAWS = 5  # control sets that a curve follows
CANDIDATES = 3  # leading features, per feature of a greedy set, that it chooses from


@dataclasses.dataclass(frozen=True)
class CurveDiffs:
    """Logit differences, without the first so many features, of the P test prompts on which sets are drawn.

    Attributes:
      sizes: how many top features are removed, rising, from 0 to all of them; S of them.
      control_sizes: to how many top features those that are removed are matched, likewise; C of them.
      top_SxP: without the top features.
      controls_ExNxP: without the features that N control sets match to them.
    """

    sizes: list[int]
    control_sizes: list[int]
    top_SxP: np.ndarray
    controls_ExNxP: np.ndarray

    def summary(self, config: AblateConfig) -> CumulativeCurve:
        """What is left at each size; intervals of the controls are of each prompt's mean over the sets."""

        def points(sizes: list[int], diff_SxP: np.ndarray, correct_SxP: np.ndarray, share: Callable) -> CurvePoints:
            return CurvePoints(tuple(sizes), _intervals(diff_SxP, config), tuple(map(share, correct_SxP)))

        def of_sets(correct_P: np.ndarray) -> Interval:
            return bootstrap_mean(correct_P, config.bootstrap, config.seed)

        controls_ExNxP = self.controls_ExNxP
        return CumulativeCurve(
            draws=controls_ExNxP.shape[1],
            top=points(self.sizes, self.top_SxP, self.top_SxP > 0, wilson),
            controls=points(
                self.control_sizes, controls_ExNxP.mean(axis=1), (controls_ExNxP > 0).mean(axis=1), of_sets
            ),
        )


def _intervals(values_SxP: np.ndarray, config: AblateConfig) -> tuple[Interval, ...]:
    return tuple(bootstrap_mean(values_P, config.bootstrap, config.seed) for values_P in values_SxP)


def cumulative_curve(experiment: Experiment, measured: JudgedDiffs) -> CurveDiffs:
    """Removes the first 1, 2, 3, ... top features together, and those matched to them, from the prompts of the draws.

    Args:
      measured: the top features and their controls. A top feature that fires nowhere has no control.

    Raises:
      UserError: something is not finite.
    """
    top, drawn_NxC = measured.top, measured.controls_NxC[:DRAWS]
    sizes, control_sizes = curve_sizes(len(top), SIZES), curve_sizes(len(top), CONTROL_SIZES)
    columns = [int(measured.fires_K[:size].sum()) for size in control_sizes]
    diffs = experiment.ablate(
        [*(top[:size] for size in sizes), *(draw_C[:count].tolist() for count in columns for draw_C in drawn_NxC)],
        measured.chosen_Q.tolist(),
    )
    top_SxP, controls_XxP = np.split(diffs.ablated_SxP, [len(sizes)])
    controls_ExNxP = controls_XxP.reshape(len(control_sizes), len(drawn_NxC), -1)
    return CurveDiffs(sizes, control_sizes, top_SxP, controls_ExNxP)


def curve_sizes(count: int, most: int) -> list[int]:
    """0, 1, 2, ..., ``count``; of more than ``most`` steps at most as many, ever further apart."""
    if count <= most:
        return list(range(count + 1))
    return [0, *np.unique(np.geomspace(1, count, most).round().astype(int)).tolist()]


@dataclasses.dataclass(frozen=True)
class Grown:
    """A greedy set and how it fares.

    Attributes:
      features: in the order in which they were added; N of them.
      train_drop: mean drop in logit difference of the train prompts without the first 1, 2, ..., N of them.
      top: as many top features by attribution.
      clean_P: logit differences of the test prompts with nothing removed.
      greedy_NxP, top_NxP: without the first 1, 2, ..., N features of each.
    """

    features: list[int]
    train_drop: list[float]
    top: list[int]
    clean_P: np.ndarray
    greedy_NxP: np.ndarray
    top_NxP: np.ndarray

    def summary(self, config: AblateConfig) -> GreedySet:
        """The features, and the drop of the test prompts' logit difference at every size."""
        return GreedySet(
            features=tuple(self.features),
            train_drop=tuple(self.train_drop),
            top=tuple(self.top),
            greedy_drop=_intervals(self.clean_P[None, :] - self.greedy_NxP, config),
            top_drop=_intervals(self.clean_P[None, :] - self.top_NxP, config),
            difference=_intervals(self.top_NxP - self.greedy_NxP, config),
        )


def grow(experiment: Experiment, attribution_F: np.ndarray, size: int) -> Grown:
    """Grows a set of ``size`` features, or of all that have a positive attribution, on train prompts.

    Each step adds that candidate whose removal together with the set lowers the mean logit difference most, of equals
    the one of larger attribution. Candidates are the ``CANDIDATES * size`` features of largest attribution.

    Raises:
      UserError: something is not finite.
    """
    candidates = screening.leaders(attribution_F, CANDIDATES * size)
    chosen: list[int] = []
    train_drop: list[float] = []
    while len(chosen) < min(size, len(candidates)):
        left = [feature for feature in candidates if feature not in chosen]
        drop_S = experiment.ablate_train([[*chosen, feature] for feature in left]).drop_SxP.mean(axis=1)
        best = int(np.argmax(drop_S))
        chosen.append(left[best])
        train_drop.append(float(drop_S[best]))
    top = candidates[: len(chosen)]
    counts = range(1, len(chosen) + 1)
    diffs = experiment.ablate([*(chosen[:n] for n in counts), *(top[:n] for n in counts)])
    greedy_NxP, top_NxP = np.split(diffs.ablated_SxP, [len(chosen)])
    return Grown(chosen, train_drop, top, diffs.clean_P, greedy_NxP, top_NxP)

"""Control features: random ones that fire as often and as strongly as the features under test.

A set of features that fires often and strongly moves the output whatever it means. So each feature under
test is compared with features that were not picked, matched on the very prompts and positions on which the
effect is measured, in

- *firing rate*: the share of positions at which the feature fires (activation above zero; in a linear dictionary, its
  size above the dictionary's threshold), and
- *mean activation*: the mean of the activation's size over the positions at which it fires.

The distance between two features is Euclidean in the logarithms of both, each divided by its standard
deviation over all features that fire.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from saejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """How often and how strongly features fire on some positions.

    Attributes:
      positions: how many positions were counted.
      fires_F: at how many of them each feature fires, int64.
      sum_F: the sizes of each feature's activations summed over those, float64.
    """

    positions: int
    fires_F: np.ndarray
    sum_F: np.ndarray

    @classmethod
    def total(cls, parts: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> "FeatureStatistics":
        """Adds up (positions, fires_F, sum_F) of disjoint sets of positions; sums are in float64."""
        positions, fires_F, sum_F = 0, np.zeros((), np.int64), np.zeros((), np.float64)
        for part_positions, part_fires_F, part_sum_F in parts:
            positions += int(part_positions)
            fires_F = fires_F + np.asarray(part_fires_F, np.int64)
            sum_F = sum_F + np.asarray(part_sum_F, np.float64)
        return cls(positions, fires_F, sum_F)

    @property
    def firing_rate_F(self) -> np.ndarray:
        """Share of the positions at which each feature fires, 0 to 1."""
        return self.fires_F / max(self.positions, 1)

    @property
    def mean_activation_F(self) -> np.ndarray:
        """Mean activation where the feature fires; 0 for one that never does."""
        return self.sum_F / np.maximum(self.fires_F, 1)

    @property
    def fires_at_all_F(self) -> np.ndarray:
        """Whether the feature fires anywhere."""
        return self.fires_F > 0

    def firing(self, features: Sequence[int]) -> list[int]:
        """Those of some features that fire anywhere."""
        return [feature for feature in features if self.fires_at_all_F[feature]]

    def of(self, feature: int) -> dict[str, float]:
        """For JSON: a feature's ``firing_rate`` and ``mean_activation``."""
        return dict(
            firing_rate=float(self.firing_rate_F[feature]), mean_activation=float(self.mean_activation_F[feature])
        )


def nearest_features(statistics: FeatureStatistics, features: Sequence[int]) -> np.ndarray:
    """The possible controls of each feature, nearest first.

    Args:
      statistics: measured on the prompts and positions of the test.
      features: K features that fire there; none of them is anyone's control.

    Returns:
      Feature indices [K, C]: in each row the C features that fire and are not in ``features``, by distance
      from that row's feature; equals in order of index.
    """
    features_K = np.asarray(features, np.int64)
    if not statistics.fires_at_all_F[features_K].all():
        raise ValueError("a feature that never fires has no matched control")
    fires_F = statistics.fires_at_all_F
    log_Fx2 = np.full((len(fires_F), 2), np.nan)
    log_Fx2[fires_F, 0] = np.log(statistics.firing_rate_F[fires_F])
    log_Fx2[fires_F, 1] = np.log(statistics.mean_activation_F[fires_F])
    spread_2 = log_Fx2[fires_F].std(axis=0) if fires_F.any() else np.ones(2)
    place_Fx2 = log_Fx2 / np.where(spread_2 > 0, spread_2, 1.0)[None, :]
    candidates_C = np.setdiff1d(np.flatnonzero(fires_F), features_K)
    apart_KxCx2 = place_Fx2[features_K][:, None, :] - place_Fx2[candidates_C][None, :, :]
    return candidates_C[np.argsort((apart_KxCx2**2).sum(axis=2), axis=1, kind="stable")]


def draw_controls(
    statistics: FeatureStatistics,
    features: Sequence[int],
    draws: int,
    matches: int,
    seed: int | Sequence[int],
    advice: str = "lower --ablate.top or --ablate.matches, raise --task.test_prompts",
) -> np.ndarray:
    """Draws sets of control features, each matched one to one to ``features``.

    Within a draw the features are served in random order; each takes one, uniformly, of the ``matches``
    nearest features (``nearest_features``) that the draw does not hold yet.

    Args:
      statistics: measured on the prompts and positions of the test.
      features: K distinct features that fire there.
      draws: number of sets, N.
      matches: how many nearest free features each control is drawn from, at least 1.
      seed: of the draws, for ``numpy.random.default_rng``.
      advice: what to do where too few other features fire.

    Returns:
      Feature indices [N, K]; column k is matched to ``features[k]``, no feature is twice in a row.

    Raises:
      UserError: fewer than K + matches - 1 other features fire, so that a choice among ``matches`` cannot
        always be given.
    """
    nearest_KxC = nearest_features(statistics, features)
    count, candidates = nearest_KxC.shape
    if count and candidates < count + matches - 1:
        raise UserError(
            f"only {candidates} features besides the {count} under test fire on the test prompts, but matched "
            f"controls need {count + matches - 1}: {advice}, or train a dictionary with more live features"
        )
    rng = np.random.default_rng(seed)
    drawn_NxK = np.zeros((draws, count), np.int64)
    for drawn_K in drawn_NxK:
        taken: set[int] = set()
        for k in rng.permutation(count):
            # Of the first matches + len(taken) candidates at least `matches` are free.
            near = nearest_KxC[k, : matches + len(taken)].tolist()
            free = [feature for feature in near if feature not in taken][:matches]
            drawn_K[k] = free[rng.integers(len(free))]
            taken.add(int(drawn_K[k]))
    return drawn_NxK


def match_ratios(
    statistics: FeatureStatistics, features: Sequence[int], controls_NxK: np.ndarray
) -> dict[str, float | None]:
    """How well the controls match: the median over draws and features of control / feature.

    Returns:
      ``firing_rate_ratio`` and ``activation_ratio``; near 1 where the match is good, None with no features.
    """
    features_1xK = np.asarray(features, np.int64)[None, :]
    if not controls_NxK.size:
        return dict(firing_rate_ratio=None, activation_ratio=None)
    rate_F, size_F = statistics.firing_rate_F, statistics.mean_activation_F
    return dict(
        firing_rate_ratio=float(np.median(rate_F[controls_NxK] / rate_F[features_1xK])),
        activation_ratio=float(np.median(size_F[controls_NxK] / size_F[features_1xK])),
    )

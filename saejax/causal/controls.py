"""Control features: random ones that fire as often and as strongly as the features under test.

A set of features that fires often and strongly moves the output whatever it means. So each feature under
test is compared with features that were not picked, matched on the very prompts and positions on which the
effect is measured, and on those that lend what stands in a removed feature's place, in

- *firing rate*: the share of positions at which the feature fires (activation above zero; in a linear dictionary, its
  size above the dictionary's threshold),
- *mean activation*: the mean of the activation's size over the positions at which it fires, and
- *decoder norm*: the length of its direction; 1 in most dictionaries, but not of neurons.

The distance between two features is Euclidean in the logarithms of all three, each divided by its standard
deviation over all features that fire (``coordinates``).
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from saejax.errors import UserError

_ALIKE = 1e-4  # logarithms with a smaller standard deviation differ by rounding


class TooFewControls(UserError):
    """Too few features fire for matched controls.

    Attributes:
      fact: that they are too few, in words, without advice.
    """

    def __init__(self, fact: str, advice: str):
        super().__init__(f"{fact}: {advice}, or train a dictionary with more live features")
        self.fact = fact


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """How often and how strongly features fire on some positions.

    Attributes:
      positions: how many positions were counted.
      fires_F: at how many of them each feature fires, int64.
      sum_F: the sizes of each feature's activations summed over those, float64.
      norm_F: lengths of the features' directions; None: they are all alike.
    """

    positions: int
    fires_F: np.ndarray
    sum_F: np.ndarray
    norm_F: np.ndarray | None = None

    @classmethod
    def total(
        cls, parts: Iterable[tuple[int, np.ndarray, np.ndarray]], norm_F: np.ndarray | None = None
    ) -> "FeatureStatistics":
        """Adds up (positions, fires_F, sum_F) of disjoint sets of positions; sums are in float64."""
        positions, fires_F, sum_F = 0, np.zeros((), np.int64), np.zeros((), np.float64)
        for part_positions, part_fires_F, part_sum_F in parts:
            positions += int(part_positions)
            fires_F = fires_F + np.asarray(part_fires_F, np.int64)
            sum_F = sum_F + np.asarray(part_sum_F, np.float64)
        return cls(positions, fires_F, sum_F, norm_F)

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

    def coordinates(self, features: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where N features that fire stand for matching, [N, C]; see ``coordinates``."""
        norm_N = None if self.norm_F is None else self.norm_F[features]
        return coordinates(self.firing_rate_F[features], self.mean_activation_F[features], norm_N)

    def firing(self, features: Sequence[int]) -> list[int]:
        """Those of some features that fire anywhere."""
        return [feature for feature in features if self.fires_at_all_F[feature]]

    def of(self, feature: int) -> dict[str, float]:
        """For JSON: a feature's ``firing_rate`` and ``mean_activation``."""
        return dict(
            firing_rate=float(self.firing_rate_F[feature]), mean_activation=float(self.mean_activation_F[feature])
        )


def coordinates(rate_N: np.ndarray, size_N: np.ndarray, norm_N: np.ndarray | None = None) -> np.ndarray:
    """Logarithms of N features' firing rates, sizes and decoder norms, each in units of its standard deviation, [N, C].

    What is the same for all of them is 0. A direction of no length counts as a millionth of the longest one.

    Args:
      rate_N, size_N: above 0.
      norm_N: at least 0; None: they are all alike.
    """
    columns = [rate_N, size_N]
    if norm_N is not None:
        longest = norm_N.max(initial=0.0)
        columns.append(np.maximum(norm_N, 1e-6 * longest if longest else 1.0))
    log_NxC = np.log(np.stack(columns, axis=1))
    spread_C = log_NxC.std(axis=0) if len(log_NxC) else np.zeros(len(columns))
    return log_NxC / np.where(spread_C > _ALIKE, spread_C, np.inf)


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
    firing_N = np.flatnonzero(fires_F)
    place_NxC = statistics.coordinates(firing_N)
    candidates_C = np.setdiff1d(firing_N, features_K)
    own_KxC, other_CxC = (place_NxC[np.searchsorted(firing_N, some)] for some in (features_K, candidates_C))
    apart_KxC = np.square(own_KxC[:, None, :] - other_CxC[None, :, :]).sum(axis=2)
    return candidates_C[np.argsort(apart_KxC, axis=1, kind="stable")]


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
      TooFewControls: fewer than K + matches - 1 other features fire, so that a choice among ``matches`` cannot
        always be given.
    """
    nearest_KxC = nearest_features(statistics, features)
    count, candidates = nearest_KxC.shape
    if count and candidates < count + matches - 1:
        fact = f"only {candidates} features besides the {count} under test fire on the test prompts"
        raise TooFewControls(f"{fact}, but matched controls need {count + matches - 1}", advice)
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
      ``firing_rate_ratio``, ``activation_ratio`` and ``norm_ratio``; near 1 where the match is good, None with no
      features or where the tested ones' values are 0.
    """
    features_1xK = np.asarray(features, np.int64)[None, :]

    def ratio(value_F: np.ndarray) -> float | None:
        own_1xK = value_F[features_1xK]
        return float(np.median(value_F[controls_NxK] / own_1xK)) if controls_NxK.size and own_1xK.all() else None

    norm_F = np.ones(len(statistics.fires_F)) if statistics.norm_F is None else statistics.norm_F
    return dict(
        firing_rate_ratio=ratio(statistics.firing_rate_F),
        activation_ratio=ratio(statistics.mean_activation_F),
        norm_ratio=ratio(norm_F),
    )

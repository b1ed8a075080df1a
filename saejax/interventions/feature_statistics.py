"""Firing rates and activations of features, and the features that are similar in these."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.spatial import cKDTree

_ALIKE = 1e-4  # logarithms with a smaller standard deviation differ by rounding


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Firing rates and activations of features at some positions.

    Attributes:
      positions: number of positions counted.
      fires_F: at how many of them each feature fires, int64.
      sum_F: the sizes of each feature's activations summed over those, float64.
      norm_F: lengths of the features' directions; None: they are all alike.
      place_F: at which token, counted from the prompt's last one as 1, each feature fires, summed over its positions,
        float64; None: it is not known.
    """

    positions: int
    fires_F: np.ndarray
    sum_F: np.ndarray
    norm_F: np.ndarray | None = None
    place_F: np.ndarray | None = None

    @classmethod
    def total(cls, parts: Iterable[Sequence], norm_F: np.ndarray | None = None) -> "FeatureStatistics":
        """Add up (positions, fires_F, sum_F), and optionally place_F, of disjoint sets of positions, in float64."""
        positions, sums = 0, [np.zeros(()), np.zeros(())]
        for part_positions, *part_sums in parts:
            positions += int(part_positions)
            sums += [np.zeros(())] * (len(part_sums) - len(sums))
            sums = [whole + np.asarray(part_F, np.float64) for whole, part_F in zip(sums, part_sums, strict=True)]
        return cls(positions, np.asarray(sums[0], np.int64), sums[1], norm_F, sums[2] if len(sums) > 2 else None)

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
        """True where the feature fires at any position, [F]."""
        return self.fires_F > 0

    def coordinates(self, features: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the coordinates of N features that fire, for matching, [N, C]; see ``coordinates``."""
        norm_N = None if self.norm_F is None else self.norm_F[features]
        place_N = None if self.place_F is None else (self.place_F / np.maximum(self.fires_F, 1))[features]
        return coordinates(self.firing_rate_F[features], self.mean_activation_F[features], norm_N, place_N)

    def firing(self, features: Sequence[int]) -> list[int]:
        """Return those of some features that fire anywhere."""
        return [feature for feature in features if self.fires_at_all_F[feature]]

    def of(self, feature: int) -> dict[str, float]:
        """Return a feature's ``firing_rate`` and ``mean_activation``, for JSON."""
        return dict(
            firing_rate=float(self.firing_rate_F[feature]), mean_activation=float(self.mean_activation_F[feature])
        )


def coordinates(
    rate_N: np.ndarray, size_N: np.ndarray, norm_N: np.ndarray | None = None, place_N: np.ndarray | None = None
) -> np.ndarray:
    """Return logarithms of what N features are matched by, each in units of its standard deviation, [N, C].

    What is the same for all of them is 0. A direction of no length counts as a millionth of the longest one.

    Args:
      rate_N: firing rates, above 0.
      size_N: mean activations where the features fire, above 0.
      norm_N: decoder norms, at least 0; None: they are all alike.
      place_N: the mean token at which each fires, counted from the end, at least 1; None: it is not known.
    """
    columns = [rate_N, size_N] + ([place_N] if place_N is not None else [])
    if norm_N is not None:
        longest = norm_N.max(initial=0.0)
        columns.append(np.maximum(norm_N, 1e-6 * longest if longest else 1.0))
    log_NxC = np.log(np.stack(columns, axis=1))
    spread_C = log_NxC.std(axis=0) if len(log_NxC) else np.zeros(len(columns))
    return log_NxC / np.where(spread_C > _ALIKE, spread_C, np.inf)


def nearest_others(place_NxC: np.ndarray, most: int) -> np.ndarray:
    """Return the nearest others of each of N features by ``place_NxC``, at most ``most``, [N, A]. N is at least 2."""
    count = len(place_NxC)
    found_NxA = cKDTree(place_NxC).query(place_NxC, k=min(most + 1, count))[1]
    itself_NxA = found_NxA == np.arange(count)[:, None]
    itself_NxA[~itself_NxA.any(axis=1), -1] = True  # of many at one place it may not be among those found
    return found_NxA[~itself_NxA].reshape(count, -1)

"""Which feature of a dictionary stands for which direction of the world."""

import dataclasses

import numpy as np
from scipy.optimize import linear_sum_assignment

_ALIKE = 0.5**0.5  # cosine above which most of a feature's length lies along a direction
_SHARED = 0.5  # cosine with each of two directions above which a feature stands for both


@dataclasses.dataclass(frozen=True)
class Matching:
    """Features of a dictionary beside the directions of the world, by the size of their cosine.

    Attributes:
      cosine_FxJ: of decoder rows and directions, without sign.
      feature_J: the feature that stands for each direction, none for two, such that the sum of cosines is largest
        (the Hungarian method); -1 where there are fewer features than directions.
      matched_J: their cosine; 0 where there is none.
      nearest_F: the direction that is nearest to each feature.
    """

    cosine_FxJ: np.ndarray
    feature_J: np.ndarray
    matched_J: np.ndarray
    nearest_F: np.ndarray

    @classmethod
    def of(cls, W_dec_FxD: np.ndarray, directions_JxD: np.ndarray) -> "Matching":
        """Of decoder rows ``W_dec`` and directions, of any length."""
        cosine_FxJ = np.abs(_unit(W_dec_FxD) @ _unit(directions_JxD).T)
        rows, columns = linear_sum_assignment(cosine_FxJ, maximize=True)
        feature_J = np.full(len(directions_JxD), -1)
        feature_J[columns] = rows
        matched_J = np.where(feature_J < 0, 0.0, cosine_FxJ[feature_J, np.arange(len(feature_J))])
        return cls(cosine_FxJ, feature_J, matched_J, cosine_FxJ.argmax(1))

    @property
    def mcc(self) -> float:
        """Mean cosine of the pairs, of which there are as many as of the fewer: features or directions."""
        return float(self.matched_J[self.feature_J >= 0].mean())

    @property
    def uniqueness(self) -> float:
        """Number of different nearest directions, over the features."""
        return len(np.unique(self.nearest_F)) / len(self.nearest_F)

    @property
    def invented_F(self) -> np.ndarray:
        """Where a feature has most of its length along no direction."""
        return self.cosine_FxJ.max(axis=1) <= _ALIKE

    @property
    def split_J(self) -> np.ndarray:
        """Where two features or more share a direction: each has most of its length along it."""
        alike_F = self.cosine_FxJ[np.arange(len(self.nearest_F)), self.nearest_F] > _ALIKE
        return np.bincount(self.nearest_F[alike_F], minlength=self.cosine_FxJ.shape[1]) > 1

    @property
    def merged_J(self) -> np.ndarray:
        """Where a direction's nearest feature is also that of another, and close to both."""
        nearest_J = self.cosine_FxJ.argmax(0)
        close_J = self.cosine_FxJ[nearest_J, np.arange(len(nearest_J))] > _SHARED
        held_F = np.bincount(nearest_J[close_J], minlength=len(self.nearest_F))
        return close_J & (held_F[nearest_J] > 1)


def _unit(values_xD: np.ndarray) -> np.ndarray:
    values_xD = np.asarray(values_xD, np.float64)
    return values_xD / np.maximum(np.linalg.norm(values_xD, axis=-1, keepdims=True), 1e-12)

"""Features of a dictionary matched to the directions of the world."""

import dataclasses

import numpy as np

from saejax.matching.assignment import assign_table

_MOSTLY = 0.5**0.5  # absolute cosine above which most of a feature's squared length lies along a direction
_CLOSE = 0.5  # absolute cosine with each of two directions above which a feature stands for both


@dataclasses.dataclass(frozen=True)
class Matching:
    """Features of a dictionary and directions of the world, compared by absolute cosine.

    Attributes:
      cosine_FxJ: absolute cosines of decoder rows and directions.
      feature_J: feature assigned to each direction, one to one, with the largest sum of cosines (Hungarian method); -1
        where there are fewer features than directions.
      matched_J: their cosines; 0 where there is none.
      nearest_F: nearest direction of each feature.
    """

    cosine_FxJ: np.ndarray
    feature_J: np.ndarray
    matched_J: np.ndarray
    nearest_F: np.ndarray

    @classmethod
    def of(cls, W_dec_FxD: np.ndarray, directions_JxD: np.ndarray) -> "Matching":
        """Match the decoder rows ``W_dec_FxD`` to directions, both of any length."""
        cosine_FxJ = np.abs(_unit(W_dec_FxD) @ _unit(directions_JxD).T)
        # One to one: a feature that is near many directions recovers only one of them.
        rows, columns = assign_table(cosine_FxJ)
        feature_J = np.full(len(directions_JxD), -1)
        feature_J[columns] = rows
        matched_J = np.where(feature_J < 0, 0.0, cosine_FxJ[feature_J, np.arange(len(feature_J))])
        return cls(cosine_FxJ, feature_J, matched_J, cosine_FxJ.argmax(1))

    @property
    def mcc(self) -> float:
        """Mean cosine of the pairs; there are as many as features or directions, whichever are fewer."""
        return float(self.matched_J[self.feature_J >= 0].mean())

    @property
    def uniqueness(self) -> float:
        """Number of distinct nearest directions, divided by the number of features."""
        return len(np.unique(self.nearest_F)) / len(self.nearest_F)

    @property
    def invented_F(self) -> np.ndarray:
        """True for a feature with most of its squared length along no direction, bool [F]."""
        return self.cosine_FxJ.max(axis=1) <= _MOSTLY

    @property
    def split_J(self) -> np.ndarray:
        """True for a direction along which at least two features have most of their squared length, bool [J]."""
        mostly_F = self.cosine_FxJ[np.arange(len(self.nearest_F)), self.nearest_F] > _MOSTLY
        return np.bincount(self.nearest_F[mostly_F], minlength=self.cosine_FxJ.shape[1]) > 1

    @property
    def merged_J(self) -> np.ndarray:
        """True for a direction whose nearest feature is close to it and also nearest and close to another, bool [J]."""
        nearest_J = self.cosine_FxJ.argmax(0)
        close_J = self.cosine_FxJ[nearest_J, np.arange(len(nearest_J))] > _CLOSE
        count_F = np.bincount(nearest_J[close_J], minlength=len(self.nearest_F))
        return close_J & (count_F[nearest_J] > 1)


def _unit(values_xD: np.ndarray) -> np.ndarray:
    values_xD = np.asarray(values_xD, np.float64)
    return values_xD / np.maximum(np.linalg.norm(values_xD, axis=-1, keepdims=True), 1e-12)

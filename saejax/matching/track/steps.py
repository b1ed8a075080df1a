"""Features of a step: those that belong to it, carry over from it, or return later.

A feature *belongs* to the part of the text in which its mean activation is largest; of a part's features those come
first whose mean there exceeds their mean over the other parts by most. It *carries over* to the steps right after its
own in which it fires without a break, and *returns* in those after a break.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.matching.track.firings import LayerFirings

_SHIFTS = 20


@dataclasses.dataclass(frozen=True)
class StepFeature:
    """A feature that belongs to a part of the text.

    Attributes:
      feature: its number.
      mean: its mean activation over the part's tokens; ``contrast``: that minus its mean over the other parts.
      carries, returns: segments to which it carries over, and in which it returns.
    """

    feature: int
    mean: float
    contrast: float
    carries: tuple[int, ...]
    returns: tuple[int, ...]


def step_features(firings: LayerFirings, segment_T: np.ndarray, count: int) -> list[list[StepFeature]]:
    """Return the features that belong to each segment, at most ``count``, first those that set it apart most.

    Args:
      firings: of a layer on the text.
      segment_T: which segment each token belongs to.
      count: of features of a segment.
    """
    features_U, mean_UxS = firings.mean_by_segment(segment_T)
    own_U, segments = mean_UxS.argmax(axis=1), mean_UxS.shape[1]
    largest_U = mean_UxS.max(axis=1)
    # Not the mean alone: what is strong in every step sets none apart.
    contrast_U = largest_U - (mean_UxS.sum(axis=1) - largest_U) / max(segments - 1, 1)
    by_segment = []
    for segment in range(segments):
        mine = np.flatnonzero(own_U == segment)
        mine = mine[np.argsort(-contrast_U[mine], kind="stable")][:count]
        by_segment.append(
            [
                StepFeature(
                    int(features_U[u]), float(largest_U[u]), float(contrast_U[u]), *_later(mean_UxS[u] > 0, segment)
                )
                for u in mine
            ]
        )
    return by_segment


def only_here(firings: LayerFirings, segment_T: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the features that fire in each segment and nowhere else, and those that would if its place were another.

    Args:
      firings: of a layer on the text.
      segment_T: which segment each token belongs to.
      seed: of the shifts.

    Returns:
      Counts [S], and the mean of counts [S] where all boundaries are shifted around the text by as many tokens.
    """
    shifts = np.random.default_rng(seed).integers(1, max(len(segment_T), 2), _SHIFTS)

    def counts(labels_T: np.ndarray) -> np.ndarray:
        _, mean_UxS = firings.mean_by_segment(labels_T)
        alone_U = (mean_UxS > 0).sum(axis=1) == 1
        return np.bincount(mean_UxS[alone_U].argmax(axis=1), minlength=mean_UxS.shape[1])

    if not len(firings.feature_A):
        none_S = np.zeros(int(segment_T.max()) + 1)
        return none_S, none_S
    # Shifted boundaries keep the lengths of segments: a long one has more features of its own by length alone.
    return counts(segment_T), np.mean([counts(np.roll(segment_T, shift)) for shift in shifts], axis=0)


def _later(fires_S: Sequence[bool], home: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the later segments to which a feature carries over, and those in which it returns."""
    later = [segment for segment in range(home + 1, len(fires_S)) if fires_S[segment]]
    carries = tuple(segment for n, segment in enumerate(later) if segment == home + 1 + n)
    return carries, tuple(later[len(carries) :])

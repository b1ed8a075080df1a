"""Groups of similar features by HDBSCAN, and how stable each group is.

HDBSCAN (scikit-learn) finds groups that are denser than their surroundings and leaves all other features alone. The
stability of a group is the mean over bootstrap samples of its largest Jaccard overlap with a group found on the sample
(Hennig, 2007, doi:10.1016/j.csda.2006.11.025). Noise has groups too, and its bootstrap samples share some of them, so a
group must exceed every group of shuffled data.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.cluster import HDBSCAN

from saejax.matching.clusters.views import View

_PARTS = 4  # a group has at most this fraction (1 / _PARTS) of the features
_CORE = 2  # features, itself included, within which HDBSCAN measures a feature's density
DISSOLVED = 0.5  # mean overlap below which a group counts as dissolved (Hennig)


@dataclasses.dataclass(frozen=True)
class StableGroups:
    """Groups of a view and their stability.

    Attributes:
      group_F: group of each feature; -1: none.
      overlap_U: stability of each group.
      null_overlap_N: the same of all groups of all shuffled data.
      null_groups: number of groups of shuffled data, mean.
    """

    group_F: np.ndarray
    overlap_U: np.ndarray
    null_overlap_N: np.ndarray
    null_groups: float

    @property
    def bar(self) -> float:
        """The overlap that a stable group exceeds."""
        return max(DISSOLVED, float(self.null_overlap_N.max(initial=0.0)))


def find_groups(
    view: View, smallest: int, resamples: int, seed: Sequence[int], on_step: Callable[[], None] = lambda: None
) -> tuple[StableGroups, np.ndarray]:
    """Return the groups of a view with their stability, and the similarity of its features, [F, F].

    Args:
      view: features; at least one.
      smallest: number of features of the smallest group.
      resamples: number of bootstrap samples, and of shuffled data.
      seed: seed of both.
      on_step: called after each of the 1 + 3 ``resamples`` groupings.
    """
    rng = np.random.default_rng(seed)

    def group(some: View, times_N: np.ndarray | None) -> np.ndarray:
        group_F = group_features(some.similarity(times_N), smallest)
        on_step()
        return group_F

    similarity_FxF = view.similarity()
    group_F = group_features(similarity_FxF, smallest)
    on_step()
    overlaps_by_resample = [overlaps(group_F, group(view, view.bootstrap(rng))) for _ in range(resamples)]
    null_overlaps = []
    for _ in range(resamples):
        shuffled = view.shuffled(rng)
        # Shuffled data go through the same steps, bootstrap included: groups of noise recur on its samples, too.
        null_overlaps.append(overlaps(group(shuffled, None), group(shuffled, shuffled.bootstrap(rng))))
    null_groups = float(np.mean([len(overlap_U) for overlap_U in null_overlaps]))
    stable = StableGroups(group_F, np.mean(overlaps_by_resample, axis=0), np.concatenate(null_overlaps), null_groups)
    return stable, similarity_FxF


def group_features(similarity_FxF: np.ndarray, smallest: int) -> np.ndarray:
    """Return the group of each feature by HDBSCAN, numbered from 0, int [F]; -1: none.

    Args:
      similarity_FxF: similarity of all pairs, at most 1; negative ones count as 0.
      smallest: minimum number of features of a group.
    """
    features = len(similarity_FxF)
    if features < max(smallest, _CORE):
        return np.full(features, -1)
    # Opposite features are as unrelated as orthogonal ones: what never fires together forms no group.
    distance_FxF = 1.0 - np.maximum(similarity_FxF.astype(np.float64), 0.0)
    np.fill_diagonal(distance_FxF, 0.0)
    largest = max(smallest, features // _PARTS)  # half of all noise, as one group, would be found on every sample
    model = HDBSCAN(
        min_cluster_size=smallest, max_cluster_size=largest, min_samples=_CORE, metric="precomputed", copy=False
    )
    label_F = model.fit_predict(distance_FxF)
    # HDBSCAN may leave smaller groups where it splits large ones: drop them, and number the rest without gaps.
    label_U, index_F, count_U = np.unique(label_F, return_inverse=True, return_counts=True)
    kept_U = (label_U >= 0) & (count_U >= smallest)
    return np.where(kept_U, np.cumsum(kept_U) - 1, -1)[index_F]


def overlaps(first_F: np.ndarray, second_F: np.ndarray) -> np.ndarray:
    """Return the largest Jaccard overlap of each group of a grouping with a group of another, [U].

    Args:
      first_F: group of each feature; -1: none.
      second_F: the same in the other grouping.
    """
    groups, others = (int(group_F.max(initial=-1)) + 1 for group_F in (first_F, second_F))
    if not groups or not others:
        return np.zeros(groups)
    # Features without a group count in the sizes below only: left alone twice is no agreement.
    both = (first_F >= 0) & (second_F >= 0)
    shared_UxE = np.zeros((groups, others))
    np.add.at(shared_UxE, (first_F[both], second_F[both]), 1.0)
    size_U = np.bincount(first_F[first_F >= 0], minlength=groups)
    size_E = np.bincount(second_F[second_F >= 0], minlength=others)
    return (shared_UxE / (size_U[:, None] + size_E[None] - shared_UxE)).max(axis=1)

"""Groups of features, and how stable they are.

Two methods, both of scikit-learn, see how alike any two features are: HDBSCAN finds groups that are denser than what is
around them, and leaves the rest alone; spectral clustering of the graph of nearest features puts every feature into one
of a given number. How stable a grouping is says the adjusted Rand index (Hubert and Arabie, 1985) with what is found on
bootstrap samples, how stable one of its groups the mean of its largest Jaccard overlap there (Hennig, 2007,
doi:10.1016/j.csda.2006.11.025). Both stand beside the same of shuffled data: a sample of noise has groups, too, and its
bootstrap samples share some of them.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from sklearn.cluster import HDBSCAN, SpectralClustering
from sklearn.metrics import adjusted_rand_score

from saejax.clusters.views import View

_NEAREST = 10  # features that each is joined with in the graph of spectral clustering
_PARTS = 4  # a group that HDBSCAN finds has no more features than one part of so many
_CORE = 2  # features, itself counted, within which HDBSCAN takes a feature's density
DISSOLVED = 0.5  # mean overlap below which a group is not found again (Hennig)

Method = Callable[[np.ndarray], np.ndarray]  # how alike features are [F, F] -> the group of each, [F]; -1: none


def methods(smallest: int, groups: int) -> dict[str, Method]:
    """The methods by name.

    Args:
      smallest: features of a group at least.
      groups: of spectral clustering; fewer where there are not that many times ``smallest`` features.
    """
    return {
        "HDBSCAN": lambda alike_FxF: _dense(alike_FxF, smallest),
        "spectral": lambda alike_FxF: _spectral(alike_FxF, min(groups, len(alike_FxF) // smallest)),
    }


def _dense(alike_FxF: np.ndarray, smallest: int) -> np.ndarray:
    if len(alike_FxF) < max(smallest, _CORE):
        return np.full(len(alike_FxF), -1)
    distance_FxF = 1.0 - np.maximum(alike_FxF.astype(np.float64), 0.0)
    np.fill_diagonal(distance_FxF, 0.0)
    largest = max(smallest, len(alike_FxF) // _PARTS)  # of noise, a large part would be found again as one group
    model = HDBSCAN(
        min_cluster_size=smallest, max_cluster_size=largest, min_samples=_CORE, metric="precomputed", copy=False
    )
    return _without_small(model.fit_predict(distance_FxF), smallest)


def _spectral(alike_FxF: np.ndarray, groups: int) -> np.ndarray:
    features = len(alike_FxF)
    if groups < 2:
        return np.full(features, -1)
    near, value_FxF = min(_NEAREST, features - 1), np.maximum(alike_FxF, 0.0)
    np.fill_diagonal(value_FxF, -1.0)
    column_FxC = np.argpartition(-value_FxF, near - 1, axis=1)[:, :near]
    row_Fx1, graph_FxF = np.arange(features)[:, None], np.zeros((features, features))
    # Even what has nothing in common is joined a little, so that the graph is in one piece.
    graph_FxF[row_Fx1, column_FxC] = np.maximum(value_FxF[row_Fx1, column_FxC], 1e-6)
    model = SpectralClustering(groups, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return model.fit_predict(np.maximum(graph_FxF, graph_FxF.T))  # dense: a sparse one is slow to factorise


def _without_small(group_F: np.ndarray, smallest: int) -> np.ndarray:
    """Groups numbered from 0; what has fewer features is none."""
    found_U, place_F, count_U = np.unique(group_F, return_inverse=True, return_counts=True)
    kept_U = (found_U >= 0) & (count_U >= smallest)
    return np.where(kept_U, np.cumsum(kept_U) - 1, -1)[place_F]


@dataclasses.dataclass(frozen=True)
class Grouped:
    """What a method finds in a view, and finds again.

    Attributes:
      group_F: the group of each feature; -1: none.
      overlap_U: of each group, the mean over samples of its largest Jaccard overlap with a group found there.
      agreement_R: adjusted Rand index with what is found on each bootstrap sample.
      null_agreement_R: the same of shuffled data, each with a sample of it.
      null_groups_R: how many groups shuffled data have.
      null_overlap_N: overlaps of all groups of all shuffled data.
    """

    group_F: np.ndarray
    overlap_U: np.ndarray
    agreement_R: np.ndarray
    null_agreement_R: np.ndarray
    null_groups_R: np.ndarray
    null_overlap_N: np.ndarray

    @property
    def bar(self) -> float:
        """The overlap that a group must exceed to be stable."""
        null = float(np.quantile(self.null_overlap_N, 0.95)) if len(self.null_overlap_N) else 0.0
        return max(DISSOLVED, null)

    @property
    def stable(self) -> bool:
        """Whether the groups are found again better than those of shuffled data, on every sample."""
        return bool((self.group_F >= 0).any() and self.agreement_R.min() > self.null_agreement_R.max())


def find(
    view: View,
    by: Mapping[str, Method],
    resamples: int,
    seed: Sequence[int],
    on_step: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Grouped], np.ndarray]:
    """Groups the features of a view by each method.

    Args:
      view: one feature at least.
      by: the methods.
      resamples: bootstrap samples, and shuffled data.
      seed: of both.
      on_step: called after each of the 1 + 3 ``resamples`` times that the features were grouped.

    Returns:
      What each method finds, and how alike any two features are.
    """
    rng = np.random.default_rng(seed)

    def grouped(some: View, times_N: np.ndarray | None) -> dict[str, np.ndarray]:
        alike_FxF = some.alike(times_N)
        found = {name: method(alike_FxF) for name, method in by.items()}
        on_step()
        return found

    alike_FxF = view.alike()
    own = {name: method(alike_FxF) for name, method in by.items()}
    on_step()
    again = [grouped(view, view.drawn(rng)) for _ in range(resamples)]
    nulls: list[tuple[dict, dict]] = []
    for _ in range(resamples):
        other = view.shuffled(rng)
        nulls.append((grouped(other, None), grouped(other, other.drawn(rng))))
    found = {
        name: Grouped(
            group_F=own[name],
            overlap_U=np.mean([overlaps(own[name], one[name]) for one in again], axis=0),
            agreement_R=np.array([agreement(own[name], one[name]) for one in again]),
            null_agreement_R=np.array([agreement(one[name], two[name]) for one, two in nulls]),
            null_groups_R=np.array([one[name].max(initial=-1) + 1 for one, _ in nulls]),
            null_overlap_N=np.concatenate([overlaps(one[name], two[name]) for one, two in nulls]),
        )
        for name in by
    }
    return found, alike_FxF


def agreement(first_F: np.ndarray, second_F: np.ndarray) -> float:
    """The adjusted Rand index of two groupings; a feature that is in no group is alone, not in a group of its like.

    0 where neither has a group, because there is nothing to agree on.

    Args:
      first_F, second_F: the group of each feature; -1: none.
    """
    if max(first_F.max(initial=-1), second_F.max(initial=-1)) < 0:
        return 0.0
    return float(adjusted_rand_score(_alone(first_F), _alone(second_F)))


def _alone(group_F: np.ndarray) -> np.ndarray:
    return np.where(group_F >= 0, group_F, group_F.max(initial=-1) + 1 + np.arange(len(group_F)))


def overlaps(first_F: np.ndarray, second_F: np.ndarray) -> np.ndarray:
    """Of each group of the first grouping, the largest Jaccard overlap with one of the second; [U]."""
    groups, others = (int(group_F.max(initial=-1)) + 1 for group_F in (first_F, second_F))
    if not groups or not others:
        return np.zeros(groups)
    both = (first_F >= 0) & (second_F >= 0)
    shared_UxE = np.zeros((groups, others))
    np.add.at(shared_UxE, (first_F[both], second_F[both]), 1.0)
    size_U = np.bincount(first_F[first_F >= 0], minlength=groups)
    size_E = np.bincount(second_F[second_F >= 0], minlength=others)
    return (shared_UxE / (size_U[:, None] + size_E[None] - shared_UxE)).max(axis=1)

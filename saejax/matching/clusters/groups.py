"""Groups of features that fire together, by HDBSCAN, and how stable each group is.

Two features are as similar as their firings on the tokens of a text correlate (phi coefficient, as in Li et al., 2024,
arXiv 2410.19750).

HDBSCAN (scikit-learn) finds groups that are denser than their surroundings and leaves all other features alone. The
stability of a group is the mean over bootstrap samples of whole texts of its largest Jaccard overlap with a group found
on the sample (Hennig, 2007, doi:10.1016/j.csda.2006.11.025). Noise has groups too, and its bootstrap samples share some
of them, so a group must exceed every group of shuffled data.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse

from saejax.errors import UserError
from saejax.matching.transfer.activity import Activity
from saejax.short_reprs import has_short_repr

_PARTS = 4  # a group has at most this fraction (1 / _PARTS) of the features
_CORE = 2  # features, itself included, within which HDBSCAN measures a feature's density
DISSOLVED = 0.5  # mean overlap below which a group counts as dissolved (Hennig)
_TOKENS, _TEXTS = 10, 5  # minimum firings: in one text alone any two features look similar


@dataclasses.dataclass(frozen=True)
class Coactivation:
    """Features of a dictionary and the tokens on which each of them fires."""

    feature_F: np.ndarray  #: indices of the features
    fires_FxN: sparse.csr_array  #: 1 where a feature fires, fp32
    text_N: np.ndarray  #: text of each token, numbered from 0; texts are resampled whole, with all of their pieces

    @classmethod
    def of(cls, activity: Activity, text_N: np.ndarray) -> "Coactivation":
        """Return the firings of a dictionary; features that fire rarely, or in few texts, are left out.

        Args:
          activity: activations of all features.
          text_N: text of each token.

        Raises:
          UserError: there are too few texts to resample.
        """
        real = np.flatnonzero(activity.real_N)
        if (texts := len(np.unique(text_N[real]))) < _TEXTS:
            raise UserError(
                f"these activations are of {texts} texts: expected {_TEXTS} at least, as a group of features is stable "
                "if it is found again on samples of whole texts; give more of them"
            )
        fires_FxX = sparse.csr_array((activity.f_NxF[real] != 0).T).astype(np.float32)
        _, text_X = np.unique(text_N[real], return_inverse=True)
        in_XxU = sparse.csr_array((np.ones(len(real), np.float32), (np.arange(len(real)), text_X)))
        texts_F = np.diff((fires_FxX @ in_XxU).tocsr().indptr)
        tokens_F = np.diff(fires_FxX.indptr)
        # What fires on every token has no correlation.
        kept = np.flatnonzero((tokens_F >= _TOKENS) & (texts_F >= _TEXTS) & (tokens_F < len(real)))
        return cls(kept, fires_FxX[kept], text_X)

    def among(self, most: int, rng: np.random.Generator) -> "Coactivation":
        """Return the firings of at most ``most`` of the features, sampled uniformly."""
        if len(self.feature_F) <= most:
            return self
        kept = np.sort(rng.choice(len(self.feature_F), most, replace=False))
        return dataclasses.replace(self, feature_F=self.feature_F[kept], fires_FxN=self.fires_FxN[kept])

    def shuffled(self, rng: np.random.Generator) -> "Coactivation":
        """Return the firings of each feature shifted by a random number of tokens, around the end of the text."""
        features, tokens = self.fires_FxN.shape
        # A shift, not a permutation: runs of firings within a text stay runs, which alone make some features overlap.
        by = np.repeat(rng.integers(tokens, size=features), np.diff(self.fires_FxN.indptr))
        moved = (self.fires_FxN.indices + by) % tokens
        shifted_FxN = sparse.csr_array((self.fires_FxN.data, moved, self.fires_FxN.indptr), (features, tokens))
        shifted_FxN.sort_indices()
        return dataclasses.replace(self, fires_FxN=shifted_FxN)

    def bootstrap(self, rng: np.random.Generator) -> np.ndarray:
        """Return how often each token occurs in a bootstrap sample of the texts, [N]."""
        texts = int(self.text_N.max(initial=-1)) + 1
        # Tokens of a text depend on each other, so texts are resampled whole.
        times = np.bincount(rng.integers(texts, size=texts), minlength=texts)
        return times[self.text_N].astype(np.float32)

    def similarity(self, times_N: np.ndarray | None = None) -> np.ndarray:
        """Return the correlation of any two features' firings, -1 to 1; 0 for a feature whose firings do not vary.

        Args:
          times_N: weight of each token; None: 1.

        Returns:
          float32 [F, F].
        """
        times_N = np.ones(len(self.text_N), np.float32) if times_N is None else times_N
        # Roots of the weights on both sides, so that the product is symmetric to the last bit.
        weighted = self.fires_FxN.multiply(np.sqrt(times_N)[None]).tocsr()
        product_FxF = (weighted @ weighted.T).toarray()
        product_FxF /= max(times_N.sum(), 1.0)
        square_F = product_FxF.diagonal().copy()
        mean_F = np.asarray(self.fires_FxN @ times_N).reshape(-1) / max(times_N.sum(), 1.0)
        product_FxF -= mean_F[:, None] * mean_F[None]
        size_F = np.sqrt(np.maximum(product_FxF.diagonal(), 0.0))
        # A row that hardly varies leaves rounding errors after its mean is subtracted: it counts as not varying.
        size_F = np.where(size_F > 1e-6 * np.sqrt(np.maximum(square_F, 1e-30)), size_F, np.inf)
        product_FxF /= size_F[:, None] * size_F[None]
        return np.clip(product_FxF, -1.0, 1.0)


@has_short_repr
@dataclasses.dataclass(frozen=True)
class StableGroups:
    """Groups of features and their stability."""

    group_F: np.ndarray  #: group of each feature; -1: none
    overlap_U: np.ndarray  #: stability of each group
    bar: float  #: the overlap that a stable group exceeds: a dissolved one's, and every group's of shuffled data
    null_groups: float  #: number of groups of shuffled data, mean


def find_groups(
    firings: Coactivation,
    smallest: int,
    resamples: int,
    seed: Sequence[int],
    on_step: Callable[[], None] = lambda: None,
) -> tuple[StableGroups, np.ndarray]:
    """Return the groups of features with their stability, and the similarity of the features, [F, F].

    Args:
      firings: the features.
      smallest: number of features of the smallest group.
      resamples: number of bootstrap samples, and of shuffled data.
      seed: seed of both.
      on_step: called after each of the 1 + 3 ``resamples`` groupings.
    """
    rng = np.random.default_rng(seed)

    def group(some: Coactivation, times_N: np.ndarray | None) -> np.ndarray:
        group_F = group_features(some.similarity(times_N), smallest)
        on_step()
        return group_F

    similarity_FxF = firings.similarity()
    group_F = group_features(similarity_FxF, smallest)
    on_step()
    overlaps_by_resample = [overlaps(group_F, group(firings, firings.bootstrap(rng))) for _ in range(resamples)]
    null_overlaps = []
    for _ in range(resamples):
        shuffled = firings.shuffled(rng)
        # Shuffled data go through the same steps, bootstrap included: groups of noise recur on its samples, too.
        null_overlaps.append(overlaps(group(shuffled, None), group(shuffled, shuffled.bootstrap(rng))))
    bar = max(DISSOLVED, float(np.concatenate(null_overlaps).max(initial=0.0)))
    null_groups = float(np.mean([len(overlap_U) for overlap_U in null_overlaps]))
    return StableGroups(group_F, np.mean(overlaps_by_resample, axis=0), bar, null_groups), similarity_FxF


def group_features(similarity_FxF: np.ndarray, smallest: int) -> np.ndarray:
    """Return the group of each feature by HDBSCAN, numbered from 0, int [F]; -1: none.

    Args:
      similarity_FxF: similarity of all pairs, at most 1; negative ones count as 0.
      smallest: minimum number of features of a group.
    """
    from sklearn.cluster import HDBSCAN

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
    first_count, second_count = (int(group_F.max(initial=-1)) + 1 for group_F in (first_F, second_F))
    if not first_count or not second_count:
        return np.zeros(first_count)
    # Features without a group count in the sizes below only: left alone twice is no agreement.
    both = (first_F >= 0) & (second_F >= 0)
    shared_UxE = np.zeros((first_count, second_count))
    np.add.at(shared_UxE, (first_F[both], second_F[both]), 1.0)
    size_U = np.bincount(first_F[first_F >= 0], minlength=first_count)
    size_E = np.bincount(second_F[second_F >= 0], minlength=second_count)
    return (shared_UxE / (size_U[:, None] + size_E[None] - shared_UxE)).max(axis=1)

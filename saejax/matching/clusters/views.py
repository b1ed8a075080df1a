"""Three views of a dictionary's features, in each of which a feature is a row of numbers.

    coactivation  whether it fires at each token of a text; similarity: correlation (phi coefficient, as in Li et al.,
                  2024, arXiv 2410.19750)
    effects       the effect of ablating it on the prompts of all behaviours; similarity: correlation
    decoder       its decoder row; similarity: cosine

The columns of a view (documents, prompts, coordinates) can be resampled with replacement, and its rows shuffled so that
each keeps its own distribution and is unrelated to all others.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from saejax.matching.rows import independent_rows, unit
from saejax.matching.transfer.activity import Activity

_TOKENS, _DOCUMENTS = 10, 5  # minimum firings: in one document alone any two features look similar
_PROMPTS = 3  # minimum number of prompts on which ablating a feature has an effect

Rows = Any  # np.ndarray or sparse.csr_array, [F, N]


@dataclasses.dataclass(frozen=True)
class View:
    """Features of a dictionary as rows of numbers.

    Attributes:
      feature_F: indices of the features.
      rows: their rows [F, N], dense or sparse.
      block_N: block of each column, from 0; blocks are resampled whole.
      centred: whether similarity is the correlation of rows; otherwise their cosine.
      shuffle: (rows, generator) -> shuffled rows.
    """

    feature_F: np.ndarray
    rows: Rows
    block_N: np.ndarray
    centred: bool
    shuffle: Callable[[Rows, np.random.Generator], Rows]

    def shuffled(self, rng: np.random.Generator) -> "View":
        """Return the same features with rows that are unrelated to each other."""
        return dataclasses.replace(self, rows=self.shuffle(self.rows, rng))

    def among(self, most: int, rng: np.random.Generator) -> "View":
        """Return a view of at most ``most`` of the features, sampled uniformly."""
        if len(self.feature_F) <= most:
            return self
        kept = np.sort(rng.choice(len(self.feature_F), most, replace=False))
        return dataclasses.replace(self, feature_F=self.feature_F[kept], rows=self.rows[kept])

    def bootstrap(self, rng: np.random.Generator) -> np.ndarray:
        """Return how often each column occurs in a bootstrap sample of the blocks, [N]."""
        blocks = int(self.block_N.max(initial=-1)) + 1
        # Tokens of a document depend on each other, so documents are resampled whole.
        return np.bincount(rng.integers(blocks, size=blocks), minlength=blocks)[self.block_N].astype(np.float32)

    def similarity(self, times_N: np.ndarray | None = None) -> np.ndarray:
        """Return the similarity of any two features, -1 to 1; 0 for a feature without a direction.

        Args:
          times_N: weight of each column; None: 1.

        Returns:
          float32 [F, F].
        """
        times_N = np.ones(len(self.block_N), np.float32) if times_N is None else times_N
        root_1xN = np.sqrt(times_N)[None]  # on both sides, so that the product is symmetric to the last bit
        weighted = self.rows.multiply(root_1xN).tocsr() if sparse.issparse(self.rows) else self.rows * root_1xN
        product = weighted @ weighted.T
        product_FxF = product.toarray() if sparse.issparse(product) else product
        product_FxF /= max(times_N.sum(), 1.0)
        square_F = product_FxF.diagonal().copy()
        if self.centred:
            mean_F = np.asarray(self.rows @ times_N).reshape(-1) / max(times_N.sum(), 1.0)
            product_FxF -= mean_F[:, None] * mean_F[None]
        size_F = np.sqrt(np.maximum(product_FxF.diagonal(), 0.0))
        # A row that hardly varies leaves rounding errors after its mean is subtracted: it counts as having no
        # direction.
        size_F = np.where(size_F > 1e-6 * np.sqrt(np.maximum(square_F, 1e-30)), size_F, np.inf)
        product_FxF /= size_F[:, None] * size_F[None]
        return np.clip(product_FxF, -1.0, 1.0)


def coactivation(activity: Activity, text_N: np.ndarray) -> View:
    """Return the view by firings; features that fire rarely, or in few documents, are left out.

    Args:
      activity: activations of all features.
      text_N: document of each token; documents are resampled whole.
    """
    real = np.flatnonzero(activity.real_N)
    fires_FxX = sparse.csr_array((activity.f_NxF[real] != 0).T).astype(np.float32)
    _, block_X = np.unique(text_N[real], return_inverse=True)
    in_XxU = sparse.csr_array((np.ones(len(real), np.float32), (np.arange(len(real)), block_X)))
    texts_F = np.diff((fires_FxX @ in_XxU).tocsr().indptr)
    tokens_F = np.diff(fires_FxX.indptr)
    # What fires on every token has no correlation.
    kept = np.flatnonzero((tokens_F >= _TOKENS) & (texts_F >= _DOCUMENTS) & (tokens_F < len(real)))
    return View(kept, fires_FxX[kept], block_X, True, _moved)


def _moved(rows: Rows, rng: np.random.Generator) -> Rows:
    """Return the firings of each feature shifted by a random number of tokens, around the end of the text."""
    assert isinstance(rows, sparse.csr_array)
    features, tokens = rows.shape
    # A shift, not a permutation: runs of firings within a text stay runs, which alone make some features overlap.
    by = np.repeat(rng.integers(tokens, size=features), np.diff(rows.indptr))
    moved = sparse.csr_array((rows.data, (rows.indices + by) % tokens, rows.indptr), rows.shape)
    moved.sort_indices()
    return moved


def effects(feature_F: np.ndarray, drop_FxP: np.ndarray) -> View:
    """Return the view by effects; features without an effect on almost all prompts are left out.

    Args:
      feature_F: indices of the features.
      drop_FxP: drop in logit difference on each prompt when each is ablated.
    """
    often = np.flatnonzero((drop_FxP != 0).sum(axis=1) >= _PROMPTS)
    return View(feature_F[often], drop_FxP[often].astype(np.float32), np.arange(drop_FxP.shape[1]), True, _permuted)


def _permuted(rows: Rows, rng: np.random.Generator) -> Rows:
    # Prompts are independent of each other, so each feature's effects can be permuted freely.
    return rng.permuted(rows, axis=1)


def decoder(W_dec_FxD: np.ndarray, activity: Activity) -> View:
    """Return the view by decoder rows; features that never fire or have a zero row are left out."""
    fires_F = np.asarray(activity.f_NxF.astype(bool).sum(axis=0)).reshape(-1) > 0
    some = np.flatnonzero(fires_F & (np.linalg.norm(W_dec_FxD, axis=1) > 0))
    # Coordinates as columns: a bootstrap over them asks whether a group rests on a few dimensions.
    return View(some, unit(W_dec_FxD[some]), np.arange(W_dec_FxD.shape[1]), False, _directions)


def _directions(rows: Rows, rng: np.random.Generator) -> Rows:
    """Return random directions with the mean and covariance of the rows."""
    return independent_rows(np.asarray(rows), rng.integers(2**31, size=2).tolist())

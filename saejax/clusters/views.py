"""What features are grouped by: three views of a dictionary, in each of which a feature is a row of numbers.

    coactivation  whether it fires, at the tokens of a text; two features are as alike as these correlate (phi
                  coefficient, as in Li et al., 2024, arXiv 2410.19750)
    effects       what removing it costs, on the prompts of all behaviours; as alike as these correlate
    decoder       what it writes; as alike as the cosine

The columns of a view (documents, prompts, coordinates) can be drawn again with replacement, and its rows shuffled such
that each feature stays what it is and none has to do with another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from saejax.transfer.activity import Activity
from saejax.transfer.compared import chance
from saejax.transfer.stability import unit

_TOKENS, _DOCUMENTS = 10, 5  # on which a feature fires at least: one text alone makes any two features look alike
_PROMPTS = 3  # on which removing a feature changes something, likewise

Rows = Any  # np.ndarray or sparse.csr_array, [F, N]


@dataclasses.dataclass(frozen=True)
class View:
    """Features of a dictionary as rows of numbers.

    Attributes:
      feature_F: their numbers.
      rows: [F, N], dense or sparse.
      block_N: which columns are drawn together: those of one number, 0 to the number of blocks less 1.
      centred: whether two features are as alike as their rows correlate; otherwise by cosine.
      shuffle: gives rows of which each is like its own, and none has to do with another.
    """

    feature_F: np.ndarray
    rows: Rows
    block_N: np.ndarray
    centred: bool
    shuffle: Callable[[Rows, np.random.Generator], Rows]

    def shuffled(self, rng: np.random.Generator) -> "View":
        """The same features, where nothing belongs together."""
        return dataclasses.replace(self, rows=self.shuffle(self.rows, rng))

    def among(self, most: int, rng: np.random.Generator) -> "View":
        """Of no more than so many features, drawn evenly."""
        if len(self.feature_F) <= most:
            return self
        kept = np.sort(rng.choice(len(self.feature_F), most, replace=False))
        return dataclasses.replace(self, feature_F=self.feature_F[kept], rows=self.rows[kept])

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """How often each column comes in a bootstrap sample of the blocks, [N]."""
        blocks = int(self.block_N.max(initial=-1)) + 1
        return np.bincount(rng.integers(blocks, size=blocks), minlength=blocks)[self.block_N].astype(np.float32)

    def alike(self, times_N: np.ndarray | None = None) -> np.ndarray:
        """How alike any two features are, -1 to 1; 0 for what has no direction.

        Args:
          times_N: how often each column counts; None: once.

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
        size_F = np.where(size_F > 1e-6 * np.sqrt(np.maximum(square_F, 1e-30)), size_F, np.inf)
        product_FxF /= size_F[:, None] * size_F[None]
        return np.clip(product_FxF, -1.0, 1.0)


def coactivation(activity: Activity, text_N: np.ndarray) -> View:
    """Features by the tokens at which they fire; those that fire seldom, or in few texts, are left out.

    Args:
      activity: of all features.
      text_N: the document that each token is of; documents are drawn again whole.
    """
    real = np.flatnonzero(activity.real_N)
    fires_FxX = sparse.csr_array((activity.f_NxF[real] != 0).T).astype(np.float32)
    _, block_X = np.unique(text_N[real], return_inverse=True)
    in_XxU = sparse.csr_array((np.ones(len(real), np.float32), (np.arange(len(real)), block_X)))
    texts_F = np.diff((fires_FxX @ in_XxU).tocsr().indptr)
    tokens_F = np.diff(fires_FxX.indptr)
    kept = np.flatnonzero((tokens_F >= _TOKENS) & (texts_F >= _DOCUMENTS) & (tokens_F < len(real)))
    return View(kept, fires_FxX[kept], block_X, True, _moved)


def _moved(rows: Rows, rng: np.random.Generator) -> Rows:
    """The firings of each feature moved on together by a random number of tokens, round the end of the text."""
    assert isinstance(rows, sparse.csr_array)
    features, tokens = rows.shape
    by = np.repeat(rng.integers(tokens, size=features), np.diff(rows.indptr))
    moved = sparse.csr_array((rows.data, (rows.indices + by) % tokens, rows.indptr), rows.shape)
    moved.sort_indices()
    return moved


def effects(feature_F: np.ndarray, drop_FxP: np.ndarray) -> View:
    """Features by what removing each costs on every prompt; those that change almost none are left out.

    Args:
      feature_F: their numbers.
      drop_FxP: by how much the logit difference of a prompt falls without each.
    """
    often = np.flatnonzero((drop_FxP != 0).sum(axis=1) >= _PROMPTS)
    return View(feature_F[often], drop_FxP[often].astype(np.float32), np.arange(drop_FxP.shape[1]), True, _permuted)


def _permuted(rows: Rows, rng: np.random.Generator) -> Rows:
    return rng.permuted(rows, axis=1)


def decoder(W_dec_FxD: np.ndarray, activity: Activity) -> View:
    """Features by the directions that they write; those that never fire, or write nothing, are left out."""
    fires_F = np.asarray(activity.f_NxF.astype(bool).sum(axis=0)).reshape(-1) > 0
    some = np.flatnonzero(fires_F & (np.linalg.norm(W_dec_FxD, axis=1) > 0))
    return View(some, unit(W_dec_FxD[some]), np.arange(W_dec_FxD.shape[1]), False, _directions)


def _directions(rows: Rows, rng: np.random.Generator) -> Rows:
    """Random directions with the mean and covariance of the rows."""
    return chance(np.asarray(rows), rng.integers(2**31, size=2).tolist())

"""Activations of features on text that models read together, and their correlations."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from saejax.dictionaries import Dictionary
from saejax.matching.rows import unit
from saejax.matching.transfer.text import ReadText
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import even_batches, round_length
from saejax.models.tokens import Tokens, pad

_PROGRAM = 1024  # tokens that run in about the time of compiling the programs of one more shape
MIN_FIRINGS = 10  # on each half of the text: correlations of fewer firings measure the size of the text


@dataclasses.dataclass(frozen=True)
class Activity:
    """A dictionary's activations on a model's tokens.

    Attributes:
      f_NxF: activations, sparse, fp32.
      real_N: tokens that are no attention sinks.
    """

    f_NxF: sparse.csr_array
    real_N: np.ndarray

    def firings(self, token_N: np.ndarray) -> np.ndarray:
        """Return on how many of some tokens each feature fires, [F]."""
        return np.bincount(self.f_NxF[token_N].indices, minlength=self.f_NxF.shape[1])

    def rows(self, token_N: np.ndarray, compared_F: np.ndarray) -> np.ndarray:
        """Return centred activations of unit length on some tokens, [F, N]; their products are Pearson's correlations.

        Args:
          token_N: indices of tokens.
          compared_F: features to compare; the rows of others are 0.
        """
        # Dense from here on: centred activations have no zeros.
        f_FxN = self.f_NxF[token_N].toarray().T
        return unit(np.where(compared_F[:, None], f_FxN - f_FxN.mean(axis=1, keepdims=True), 0.0))

    def rate_matched(self, feature_M: np.ndarray) -> np.ndarray:
        """Return for each of some features another one with the most similar firing rate, [M]; itself if alone."""
        rate_Fx1 = np.bincount(self.f_NxF.indices, minlength=self.f_NxF.shape[1])[:, None].astype(np.float64)
        # Two neighbours, since the nearest is usually the feature itself.
        near_MxK = cKDTree(rate_Fx1).query(rate_Fx1[feature_M], k=min(2, len(rate_Fx1)))[1].reshape(len(feature_M), -1)
        return np.where(near_MxK[:, 0] == feature_M, near_MxK[:, -1], near_MxK[:, 0])

    def save(self, path: Path) -> None:
        """Write the activity to a .npz file."""
        f = self.f_NxF
        np.savez(path, data=f.data, indices=f.indices, indptr=f.indptr, shape=f.shape, real_N=self.real_N)

    @classmethod
    def load(cls, path: Path) -> "Activity":
        """Read an activity that ``save`` wrote."""
        with np.load(path) as parts:
            arrays = parts["data"], parts["indices"], parts["indptr"]
            return cls(sparse.csr_array(arrays, shape=tuple(parts["shape"])), parts["real_N"])


def site_values(lm: LanguageModel, read: ReadText, sites: Sequence[str], batch_tokens: int) -> Mapping[str, np.ndarray]:
    """Return the values of some sites at every token of the texts, special tokens left out, fp32 [N, D] each."""
    starts = np.cumsum([0, *(len(piece) - read.front for piece in read.pieces)])
    values = {site: np.zeros((starts[-1], lm.config.d_model), np.float32) for site in sites}
    lengths = np.array([round_length(len(piece)) for piece in read.pieces], np.int64)
    for chosen, rows, length in even_batches(lengths, batch_tokens, lm.mesh.shape["data"], _PROGRAM):
        filled = pad([*(read.pieces[i].tolist() for i in chosen), *[[0]] * (rows - len(chosen))])
        ids_BxT = np.pad(filled.ids_BxT, ((0, 0), (0, length - filled.ids_BxT.shape[1])))
        output = lm(Tokens(ids_BxT, filled.lengths_B), capture=sites, logits=False)
        for site in sites:
            value_BxTxD = np.asarray(output.sites[site], np.float32)
            for row, piece in enumerate(chosen):
                # Without special tokens: they end at no character, so no other model's token is their pair.
                part_NxD = value_BxTxD[row, read.front : filled.lengths_B[row]]
                values[site][starts[piece] : starts[piece] + len(part_NxD)] = part_NxD
    return values


def encode(dictionary: Dictionary, x_NxD: np.ndarray, batch_tokens: int) -> Activity:
    """Return the activity of a dictionary on values of its site.

    Args:
      dictionary: the dictionary.
      x_NxD: values of its site.
      batch_tokens: tokens that are encoded at a time; the last batch is padded.
    """
    parts, real = [], []
    for start in range(0, len(x_NxD), batch_tokens):
        batch_XxD = x_NxD[start : start + batch_tokens]
        # The last batch is filled up: one program for all.
        padded_BxD = np.pad(batch_XxD, ((0, batch_tokens - len(batch_XxD)), (0, 0)))
        f_BxF, real_B = jax.device_get(encode_tokens(dictionary, padded_BxD))
        parts.append(sparse.csr_array(f_BxF[: len(batch_XxD)]))
        real.append(real_B[: len(batch_XxD)])
    return Activity(sparse.vstack(parts, format="csr"), np.concatenate(real))


@jax.jit
def encode_tokens(dictionary: Dictionary, x_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return activations, 0 where a feature does not fire, [B, F], and which tokens are no attention sinks [B]."""
    f_BxF, real_B = dictionary.encode(x_BxD), dictionary.is_not_sink(x_BxD)
    return jnp.where(dictionary.fires(f_BxF) & real_B[:, None], f_BxF, 0.0), real_B

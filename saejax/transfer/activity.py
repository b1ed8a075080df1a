"""What features do on text that models read together, and which of two models' features do the same."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from saejax.dictionaries import Dictionary
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import even_batches, round_length
from saejax.models.tokens import Tokens, pad
from saejax.transfer.stability import unit
from saejax.transfer.text import ReadText

_PROGRAM = 1024  # tokens that run in the time in which the programs of another shape are compiled, roughly
FEWEST = 3  # tokens on which a feature must fire: those of one token correlate perfectly


@dataclasses.dataclass(frozen=True)
class Activity:
    """A dictionary's features on the tokens of a model.

    Attributes:
      f_NxF: activations, sparse, fp32.
      real_N: the tokens at which features count: no attention sinks.
    """

    f_NxF: sparse.csr_array
    real_N: np.ndarray

    def rows(self, token_N: np.ndarray) -> np.ndarray:
        """Each feature's activations on some tokens less their mean, of length 1, [F, N].

        Products of such rows are Pearson's correlations. Features that fire on fewer than three have 0.
        """
        f_FxN = self.f_NxF[token_N].toarray().T
        often_F = (f_FxN != 0).sum(axis=1) >= FEWEST
        return unit(np.where(often_F[:, None], f_FxN - f_FxN.mean(axis=1, keepdims=True), 0.0))

    def alike(self, feature_M: np.ndarray) -> np.ndarray:
        """For each of some features another one that fires most nearly as often, [M]; itself if it is alone."""
        rate_Fx1 = np.diff(self.f_NxF.tocsc().indptr)[:, None].astype(np.float64)
        found_MxK = cKDTree(rate_Fx1).query(rate_Fx1[feature_M], k=min(2, len(rate_Fx1)))[1].reshape(len(feature_M), -1)
        return np.where(found_MxK[:, 0] == feature_M, found_MxK[:, -1], found_MxK[:, 0])


def activations(lm: LanguageModel, read: ReadText, sites: Sequence[str], batch_tokens: int) -> Mapping[str, np.ndarray]:
    """The values at some sites at every token of the texts, special ones left out, fp32 [N, D] each."""
    starts = np.cumsum([0, *(len(piece) - read.front for piece in read.pieces)])
    found = {site: np.zeros((starts[-1], lm.config.d_model), np.float32) for site in sites}
    lengths = np.array([round_length(len(piece)) for piece in read.pieces], np.int64)
    for chosen, rows, length in even_batches(lengths, batch_tokens, lm.mesh.shape["data"], _PROGRAM):
        filled = pad([*(read.pieces[i].tolist() for i in chosen), *[[0]] * (rows - len(chosen))])
        ids_BxT = np.pad(filled.ids_BxT, ((0, 0), (0, length - filled.ids_BxT.shape[1])))
        output = lm(Tokens(ids_BxT, filled.lengths_B), capture=sites, logits=False)
        for site in sites:
            value_BxTxD = np.asarray(output.sites[site], np.float32)
            for row, piece in enumerate(chosen):
                own = value_BxTxD[row, read.front : filled.lengths_B[row]]
                found[site][starts[piece] : starts[piece] + len(own)] = own
    return found


def encode(dictionary: Dictionary, x_NxD: np.ndarray, batch_tokens: int) -> Activity:
    """The activations of a dictionary's features on values ``x_NxD`` of its site, ``batch_tokens`` at a time."""
    parts, real = [], []
    for start in range(0, len(x_NxD), batch_tokens):
        some_XxD = x_NxD[start : start + batch_tokens]
        filled_BxD = np.pad(some_XxD, ((0, batch_tokens - len(some_XxD)), (0, 0)))
        f_BxF, real_B = jax.device_get(encode_tokens(dictionary, filled_BxD))
        parts.append(sparse.csr_array(f_BxF[: len(some_XxD)]))
        real.append(real_B[: len(some_XxD)])
    return Activity(sparse.vstack(parts, format="csr"), np.concatenate(real))


@jax.jit
def encode_tokens(dictionary: Dictionary, x_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    f_BxF, real_B = dictionary.encode(x_BxD), dictionary.is_not_sink(x_BxD)
    return jnp.where(dictionary.fires(f_BxF) & real_B[:, None], f_BxF, 0.0), real_B

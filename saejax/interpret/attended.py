"""Attention heads whose attention correlates with a feature's activation, over tokens of the search text.

For every head before the feature's site and every token, we take the share of attention that falls on some *classes* of
keys, by distance and by token. Features are correlated (Pearson) with these shares. The control moves activations to
other documents at the same positions, which keeps what positions alone explain. The largest correlation of a feature
with any head and class over ``SHIFTS`` such moves is its bar, so an unrelated feature exceeds it with probability
1 / (SHIFTS + 1).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from saejax.activations.chunker import SPLITS
from saejax.interpret.feature_record import HeadLooks
from saejax.interpret.firings import Block, priority
from saejax.interpret.text import SHAPES, CodedText, shape_of
from saejax.models import decoder
from saejax.models.attention import AttentionSpec, attention_weights, whole_prompt_tables
from saejax.models.config import GRADIENT, DecoderConfig
from saejax.models.decoder import run_layers
from saejax.models.language_model import LanguageModel
from saejax.models.layers import layer_of
from saejax.models.parameters import LAYERS

CLASSES = (
    *("itself", "the token before", "2 to 7 before", "8 or more before", "the first token"),
    *("the same token earlier", "the token after an earlier same one", "punctuation or a line break"),
)
SHIFTS = 19  # controls move activations by 1 to SHIFTS documents
LONGEST, AT_ONCE = 128, 8  # tokens of a document, documents in a batch
_MIN_FIRINGS = 20  # of a correlated feature
_KEPT = 4  # largest number of heads and classes listed for a feature
_MARKS = [SHAPES.index(name) for name in ("punctuation", "line break")]


@functools.partial(jax.jit, static_argnums=(0, 1))
def attended(
    config: DecoderConfig, layers: int, params: decoder.Params, ids_BxT: jax.Array, marks_V: jax.Array
) -> jax.Array:
    """Return the share of attention of each head of the first layers on each class, [B, T, L, H, C].

    Args:
      config: configuration of the decoder.
      layers: number of layers.
      params: parameters of the decoder.
      ids_BxT: token ids.
      marks_V: whether a token is punctuation or a line break.
    """
    count, length = ids_BxT.shape
    tables, earlier_TxT = whole_prompt_tables(config, length), jnp.tri(length, length, -1, bool)
    age_TxT = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    same_BxTxT = (ids_BxT[:, :, None] == ids_BxT[:, None, :]) & earlier_TxT[None]
    # Shifted by a key, "an earlier equal token" becomes "the token that came after it", which induction heads look at.
    after_BxTxT = jnp.pad(same_BxTxT, ((0, 0), (0, 0), (1, 0)))[:, :, :length] & earlier_TxT[None]
    by_age = [age_TxT == 0, age_TxT == 1, (age_TxT >= 2) & (age_TxT < 8), age_TxT >= 8]
    by_key = [jnp.arange(length) == 0, same_BxTxT, after_BxTxT, marks_V[ids_BxT][:, None, :]]
    masks = [jnp.broadcast_to(mask, same_BxTxT.shape).astype(jnp.float32) for mask in (*by_age, *by_key)]

    sinks_LxH = params.get(f"{LAYERS}sinks_H")

    def look(plain: Any, layer: Any, qkv: Any, carried: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Softmax weights are summed in float32: bfloat16 would lose small shares.
        here = tables.at(config, layer)
        if sinks_LxH is not None:
            here = here._replace(sinks_H=layer_of(sinks_LxH, layer))
        weights = attention_weights(config, GRADIENT, qkv[0], qkv[1], here).astype(jnp.float32)
        weights_BxHxTxT = weights.reshape(count, config.n_heads, length, length)
        shares = [jnp.einsum("bhts,bts->bth", weights_BxHxTxT, mask) for mask in masks]
        return plain(*qkv), carried.at[:, :, layer].set(jnp.stack(shares, axis=-1))

    start = jnp.zeros((count, length, layers, config.n_heads, len(CLASSES)), jnp.float32)
    # Shares are summed inside the loop over layers, so that attention patterns of all layers are never held at once.
    attention = AttentionSpec(tables, look, start)
    return run_layers(config, params, decoder.embed(config, params, ids_BxT), 0, layers, attention=attention).carried


class HeadShares:
    """Attention shares at tokens of documents, all truncated to one length.

    Args:
      lm: the model.
      text: text of the store; documents of the search text are used.
      layers: number of layers, from the first.
      tokens: approximate number of tokens.
    """

    def __init__(self, lm: LanguageModel, text: CodedText, layers: int, tokens: int):
        documents = text.documents
        train_S = np.flatnonzero(documents.column("split") == SPLITS.index("train"))
        # Equal lengths let the control move all shares by whole documents without changing a token's position.
        length = int(min(LONGEST, np.median(documents.lengths_N[train_S])))
        long_C = train_S[documents.lengths_N[train_S] >= length]
        # By hash instead of a random state: all dictionaries and all runs look at the same documents.
        documents_D = long_C[np.argsort(priority(long_C))][: -(-tokens // length)]
        place_DxT = documents.starts_N[documents_D][:, None] + np.arange(length)
        marks_V = np.array([shape_of(piece) % len(SHAPES) in _MARKS for piece in text.texts])
        rows = []
        for start in range(0, len(documents_D), AT_ONCE):
            ids_BxT = documents.ids_T[place_DxT[start : start + AT_ONCE]]
            # The last batch is filled up, so that one program serves all batches.
            padded = np.pad(ids_BxT, ((0, AT_ONCE - len(ids_BxT)), (0, 0)))
            rows.append(np.asarray(attended(lm.config, layers, lm.params, padded, marks_V))[: len(ids_BxT)])
        self._heads, self._documents, self._length = lm.config.n_heads, len(documents_D), length - 1
        # The first token attends only to itself.
        shares_NxM = np.concatenate(rows)[:, 1:].reshape(len(documents_D) * (length - 1), -1)
        spread_M = shares_NxM.std(axis=0)
        # A share that never varies, such as the share of punctuation in a text without any, counts as uncorrelated.
        scaled_NxM = np.where(spread_M > 1e-6, (shares_NxM - shares_NxM.mean(axis=0)) / np.maximum(spread_M, 1e-6), 0)
        self._shares_NxM = scaled_NxM.astype(np.float32)
        self._row = np.full(len(documents.ids_T), -1)
        self._row[place_DxT[:, 1:].reshape(-1)] = np.arange(len(shares_NxM))

    def of(self, block: Block) -> list[HeadLooks | None]:
        """Return the heads that correlate with each feature of a block; None for features that fire too rarely."""
        if self._documents <= SHIFTS:
            return [None] * block.size
        row = self._row[block.place]
        inside = row >= 0
        row, feature, value = row[inside], block.feature[inside], block.value[inside]
        r_FxM, bar = self._correlations(row, feature, value, block.size), np.zeros(block.size)
        for shift in range(1, SHIFTS + 1):
            # Moved by whole documents, firings keep their positions: a correlation with position alone is in the bar
            # too.
            moved = (row + shift * self._length) % len(self._shares_NxM)
            bar = np.maximum(bar, np.abs(self._correlations(moved, feature, value, block.size)).max(axis=1))
        able = np.bincount(feature, minlength=block.size) >= _MIN_FIRINGS
        return [self._describe(r_FxM[i], bar[i]) if able[i] else None for i in range(block.size)]

    def _correlations(self, row: np.ndarray, feature: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
        """Return the Pearson correlations of features with all shares, [size, M]."""
        n = len(self._shares_NxM)
        f_FxN = sparse.csr_array((value.astype(np.float32), (feature, row)), (size, n))
        mean = np.bincount(feature, value, size) / n
        square = np.bincount(feature, value.astype(np.float64) ** 2, size) / n
        spread = np.sqrt(np.maximum(square - mean**2, 1e-30))
        return (f_FxN @ self._shares_NxM) / (n * spread[:, None])  # the shares have a mean of 0

    def _describe(self, r_M: np.ndarray, bar: float) -> HeadLooks:
        """Return the heads beyond the bar: the largest correlation of any share, as all compete for the list."""
        best = np.argsort(-np.abs(r_M))[:_KEPT]
        listed: list[tuple[int, int, str, float]] = []
        for at in best[np.abs(r_M[best]) > bar].tolist():
            head, which = divmod(at, len(CLASSES))
            listed.append((*divmod(head, self._heads), CLASSES[which], float(f"{r_M[at]:.3g}")))
        return HeadLooks(heads=listed, bar=float(f"{bar:.3g}"))

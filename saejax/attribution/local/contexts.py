"""Contexts in which features of transcoders fire, searched in texts by their encoders alone."""

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.local.state import AT_ONCE, FrozenModel, embed, encode_used, first_used, padded, run_layer
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import token_piece
from saejax.parallel.collectives import to_host
from saejax.progress import OnProgress, silent
from saejax.unicode import join_pieces

_BEFORE, _AFTER = 10, 3  # tokens of a context around its strongest one
_TOKENS = 32  # of each text that are read
_TEXTS = 64  # that run at once
_CONTEXTS = 5  # of a feature, the strongest ones
_FEATURES = 16  # least size to which the features of a layer are padded
_BARS = 10  # of a histogram
_EDGES = np.linspace(0, 1, _BARS + 1)  # of its bars, as shares of the largest activation
Context = dict[str, Any]  # ``tokens`` and ``activations``, of equal length


class Firings(NamedTuple):
    """The firings of a feature in texts."""

    contexts: tuple[Context, ...]  #: the strongest, one of each text at most; none if it does not fire
    histogram: tuple[tuple[float, float], ...]  #: activations above 0 in ten bars up to the largest: middle and number


class ContextSearch:
    """Searches texts; of up to 64 texts, what the transcoders read in them is kept for the next search.

    Args:
      model: the language model.
      transcoders: whose features are searched.
      texts: of each the first 32 tokens are searched.
    """

    def __init__(self, model: LanguageModel, transcoders: LayerTranscoders, texts: Sequence[str]):
        self.model, self.transcoders = model, transcoders
        self._batches = [list(texts[start : start + _TEXTS]) for start in range(0, len(texts), _TEXTS)]
        self._kept: _TextRun | None = None

    def firings(
        self, features: Collection[tuple[int, int]], on_progress: OnProgress = silent
    ) -> dict[tuple[int, int], Firings]:
        """Return where features fire, and how strongly.

        Args:
          features: layer and index of each.
          on_progress: called with the layers run, of all texts, and their total; may raise to stop.

        Raises:
          UserError: an activation is not finite.
        """
        # Of each feature its peaks: activation, ids of the tokens around it, and their activations.
        peaks: dict[tuple[int, int], list[tuple[float, tuple[int, ...], list[float]]]] = {
            feature: [] for feature in features
        }
        if not peaks:
            return {}
        acts: dict[tuple[int, int], list[np.ndarray]] = {feature: [] for feature in features}
        model, count = self.model, 1 + max(peaks)[0]
        self.transcoders.check(model)
        wanted_by_layer = [sorted(index for at, index in peaks if at == layer) for layer in range(count)]
        width = padded(max(map(len, wanted_by_layer)), _FEATURES)  # one size, so that all layers share a program
        for number, texts in enumerate(self._batches):
            run = self._kept or _TextRun(model, self.transcoders.reads, texts)
            if len(self._batches) == 1:
                self._kept = run
            for layer, wanted in enumerate(wanted_by_layer):
                on_progress(number * count + layer, len(self._batches) * count)
                read_RxTxD = run.read(layer)
                if not wanted:
                    continue
                encoder = self.transcoders.encoder(layer, model.mesh)
                value_RxTxU = _activations(encoder, np.array(wanted, np.int32), width, read_RxTxD, run.is_used_RxT)
                if not np.isfinite(value_RxTxU).all():
                    raise UserError(
                        f"activations of features in layer {layer} are not finite: the transcoder's or the model's "
                        "weights are damaged"
                    )
                for feature, value_RxT in zip(wanted, np.moveaxis(value_RxTxU, 2, 0), strict=True):
                    acts[layer, feature].append(value_RxT[value_RxT > 0])
                peak_RxU, at_RxU = value_RxTxU.max(axis=1), value_RxTxU.argmax(axis=1)
                for row_U in np.argsort(-peak_RxU, axis=0, kind="stable")[:_CONTEXTS]:
                    for unit in np.flatnonzero(np.take_along_axis(peak_RxU, row_U[None], axis=0)[0]).tolist():
                        row, peak = row_U[unit], int(at_RxU[row_U[unit], unit])
                        near = slice(max(peak - _BEFORE, 0), min(peak + _AFTER + 1, len(run.ids[row])))
                        values = value_RxTxU[row, near, unit].tolist()
                        peaks[layer, wanted[unit]].append((values[peak - near.start], run.ids[row][near], values))
        as_piece = functools.cache(token_piece(model.tokenizer))
        # Many features fire most strongly at the same token.
        join = functools.cache(lambda tokens: join_pieces(list(map(as_piece, tokens))))
        strongest = {feature: sorted(some, key=lambda peak: -peak[0])[:_CONTEXTS] for feature, some in peaks.items()}
        return {
            feature: Firings(
                tuple(_context(*join(tokens), values) for _, tokens, values in some),
                _bars(np.concatenate([np.zeros(0, np.float32), *acts[feature]])),
            )
            for feature, some in strongest.items()
        }


def _bars(value_A: np.ndarray) -> tuple[tuple[float, float], ...]:
    if not len(value_A):
        return ()
    # Not by ``np.histogram``, whose checks take longer than all else that is done for a feature.
    edges = float(value_A.max()) * _EDGES
    bar_A = np.minimum(np.searchsorted(edges, value_A, side="right") - 1, _BARS - 1)
    counts = np.bincount(bar_A, minlength=_BARS)
    return tuple(zip(((edges[1:] + edges[:-1]) / 2).tolist(), counts.tolist(), strict=True))


def _context(tokens: Sequence[str], firsts: Sequence[int], values: Sequence[float]) -> Context:
    return dict(tokens=list(tokens), activations=np.maximum.reduceat(values, firsts).tolist())


class _TextRun:
    """Texts that go up through the layers of a model, as far as they are wanted.

    Attributes:
      ids: of each text the ids of its tokens.
      is_used_RxT: where features are used.
    """

    def __init__(self, model: LanguageModel, reads: str, texts: Sequence[str]):
        most = min(_TOKENS, model.config.context)
        self.ids = [tuple(model.encode(text)[:most]) for text in texts]
        ids_RxT = np.zeros((len(texts), padded(max(map(len, self.ids)))), np.int32)
        self.is_used_RxT = np.zeros(ids_RxT.shape, bool)
        for row, ids in enumerate(self.ids):
            ids_RxT[row, : len(ids)] = ids
            self.is_used_RxT[row, first_used(model.config, ids_RxT[row]) : len(ids)] = True
        self._frozen = FrozenModel(model.config, model.params, reads)
        self._x_RxTxD = embed(self._frozen, ids_RxT)
        self._read = list[jax.Array]()

    def read(self, layer: int) -> jax.Array:
        """Return what the transcoder of a layer reads, [R, T, D]."""
        while len(self._read) <= layer:
            index = np.int32(len(self._read))
            self._x_RxTxD, read_RxTxD, _ = run_layer(self._frozen, "none", index, self._x_RxTxD)
            self._read.append(read_RxTxD)
        return self._read[layer]


def _activations(
    encoder: Dictionary, feature_U: np.ndarray, width: int, read_RxTxD: jax.Array, is_used_RxT: np.ndarray
) -> np.ndarray:
    """Return activations of some features, 0 where features are not used, fp32 [R, T, U]; ``width`` are encoded."""
    column_U = feature_U
    if encoder.kind.is_elementwise():  # TopK compares features with each other, and needs all of them
        # Filled up with copies.
        filled_X = np.pad(feature_U, (0, width - len(feature_U)), mode="edge")
        encoder, column_U = encoder.restrict(filled_X), np.arange(len(feature_U))
    texts, length = is_used_RxT.shape
    size = max(AT_ONCE // (length * encoder.config.n_features), 1)
    chunks = (slice(start, start + size) for start in range(0, texts, size))
    return np.concatenate(
        [to_host(encode_used(encoder, read_RxTxD[part], is_used_RxT[part]))[..., column_U] for part in chunks]
    )

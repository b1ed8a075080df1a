"""Contexts in which features of transcoders fire, searched in texts by their encoders alone."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from saejax.arguments import check_classes
from saejax.attribution.local.dictionaries import LayerSaes
from saejax.attribution.local.model import AnySet, open_set
from saejax.attribution.local.state import AT_ONCE, FrozenModel, embed, encode_used, first_used, padded, run_layer
from saejax.dictionaries import Dictionary
from saejax.dictionaries.bos import follow_bos
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
_PARTS = 4  # of the range of activations that have contexts of their own
_OF_PART = 2  # contexts of each
Context = dict[str, Any]  # ``tokens`` and ``activations``, of equal length


class Firings(NamedTuple):
    """The firings of a feature in texts; absolute activations, as some kinds have negative ones."""

    contexts: tuple[Context, ...]  #: the strongest, one of each text at most; none if it does not fire
    histogram: tuple[tuple[float, float], ...]  #: activations but 0 in ten bars up to the largest: middle and number
    #: quarters of the range up to the largest activation, the upper one first: of each its name, and the first two
    #: contexts of texts whose strongest firing is in it; quarters without one are left out.
    quantiles: tuple[tuple[str, tuple[Context, ...]], ...]


class ContextSearch:
    """Searches texts for contexts in which features fire; of up to 64, what transcoders read is kept for more searches.

    ``Graph.show`` and ``save_page`` take one, and describe the features that they show.

    Args:
      model: the language model.
      transcoders: whose features are searched: an open set, dictionaries of all layers in memory, or what
        ``open_transcoders`` opens.
      texts: of each the first 32 tokens are searched. They begin as the dictionaries' training texts (``follow_bos``).
    """

    @check_classes
    def __init__(self, model: LanguageModel, transcoders: AnySet, texts: Sequence[str]):
        if isinstance(transcoders, LayerSaes):
            raise UserError("contexts are searched for features of transcoders, and these are SAEs")
        self.transcoders = open_set(transcoders)
        self.model = follow_bos(model, self.transcoders.configs)
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
        # Of each feature the places where it fires, ``_TOKENS`` to a text, and its activations there; a part per batch.
        fired: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {feature: [] for feature in features}
        if not fired:
            return {}
        model, count, ids = self.model, 1 + max(fired)[0], list[tuple[int, ...]]()
        self.transcoders.check(model)
        wanted_by_layer = [sorted(index for at, index in fired if at == layer) for layer in range(count)]
        width = padded(max(map(len, wanted_by_layer)), _FEATURES)  # one size, so that all layers share a program
        for number, texts in enumerate(self._batches):
            run = self._kept or _TextRun(model, self.transcoders.reads, texts)
            if len(self._batches) == 1:
                self._kept = run
            first = len(ids)
            ids += run.ids
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
                # As ``interpret`` has them: a signed dictionary fires below 0, too.
                value_RxTxU = np.abs(value_RxTxU)
                for feature, value_RxT in zip(wanted, np.moveaxis(value_RxTxU, 2, 0), strict=True):
                    row_A, position_A = np.nonzero(value_RxT > 0)
                    place_A = (first + row_A) * _TOKENS + position_A
                    fired[layer, feature].append((place_A, value_RxT[row_A, position_A]))
        as_piece = functools.cache(token_piece(model.tokenizer))
        # Many features fire most strongly at the same token.
        join = functools.cache(lambda tokens: join_pieces(list(map(as_piece, tokens))))
        return {feature: _describe(parts, ids, join) for feature, parts in fired.items()}


def _describe(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], ids: Sequence[tuple[int, ...]], join: Callable[..., Any]
) -> Firings:
    """Return what is told of a feature that fires at these places; ``join`` makes texts of token ids."""
    if not any(len(place_A) for place_A, _ in parts):
        return Firings((), (), ())
    place_A, value_A = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    row_A = place_A // _TOKENS
    start_X = np.flatnonzero(np.diff(row_A, prepend=-1))  # where the firings in each of the texts begin
    stop_X, peak_X = np.append(start_X[1:], len(row_A)), np.maximum.reduceat(value_A, start_X)

    def context(text: int) -> Context:
        """Return the tokens around the strongest firing in a text."""
        firings, value_T = slice(start_X[text], stop_X[text]), np.zeros(_TOKENS, np.float32)
        position_A, tokens = place_A[firings] % _TOKENS, ids[row_A[start_X[text]]]
        value_T[position_A] = value_A[firings]
        peak = int(value_T.argmax())
        near = slice(max(peak - _BEFORE, 0), min(peak + _AFTER + 1, len(tokens)))
        texts, firsts = join(tokens[near])
        return dict(tokens=list(texts), activations=np.maximum.reduceat(value_T[near], firsts).tolist())

    strongest = np.argsort(-peak_X, kind="stable")[:_CONTEXTS].tolist()
    edges = float(peak_X.max()) * np.linspace(0, 1, _PARTS + 1)
    part_X = np.minimum(np.searchsorted(edges, peak_X, side="right") - 1, _PARTS - 1)
    quantiles = [
        (f"activation {edges[part]:.3g} to {edges[part + 1]:.3g}", tuple(map(context, texts)))
        for part in reversed(range(_PARTS))
        if (texts := np.flatnonzero(part_X == part)[:_OF_PART].tolist())
    ]
    return Firings(tuple(map(context, strongest)), _bars(value_A), tuple(quantiles))


def _bars(value_A: np.ndarray) -> tuple[tuple[float, float], ...]:
    # Not by ``np.histogram``, whose checks take longer than all else that is done for a feature.
    edges = float(value_A.max()) * _EDGES
    bar_A = np.minimum(np.searchsorted(edges, value_A, side="right") - 1, _BARS - 1)
    counts = np.bincount(bar_A, minlength=_BARS)
    return tuple(zip(((edges[1:] + edges[:-1]) / 2).tolist(), counts.tolist(), strict=True))


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

"""The contexts in which features fire most strongly.

Two passes over a store. The first streams all rows and keeps, for each feature, the rows of its largest
activations; memory does not grow with the store. Whether a feature is active can depend on all others (TopK),
but no sparsity function raises an activation above max(pre-activation, 0), and that bound takes one column of the
encoder only. So only the rows whose bound could still make it are encoded, and the result is exact. The second
pass encodes the neighbours of the rows found, so that each example shows the feature's activation on every token
around its maximum. In a dictionary whose activations have both signs, an activation here is its size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.activations.documents import Documents
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary
from saejax.page.strips import Example

_SPARE = 4  # candidates kept per example asked for, because contexts that repeat are passed over
_ROWS_AT_ONCE = 1_000_000  # rows whose documents and positions are looked up at once
_ENCODED_AT_ONCE = 256  # rows per call of the encoder
_SLACK = 1.02  # on the bound, for rounding: its products are float32, the encoder's may be bfloat16


@dataclasses.dataclass(frozen=True)
class Window:
    """Where an example stands: tokens start..stop-1 of a document, around ``position``."""

    document: int
    position: int
    start: int
    stop: int


def top_examples(
    store: Store,
    dictionary: Dictionary,
    features: Sequence[int],
    count: int,
    decode: Callable[[int], str],
    *,
    before: int = 14,
    after: int = 6,
    batch: int = 4096,
    splits: Sequence[str] = ("train", "held_out"),
) -> dict[int, list[Example]]:
    """The contexts where features fire most strongly, strongest first.

    Contexts come from distinct groups of documents (openings or templates of the corpus) as long as there are
    enough, then from distinct documents; then further places of the same documents follow. A context that repeats
    another one token for token, or lies within one already chosen, is passed over, so that fewer than ``count``
    may remain.

    Args:
      store: activations of the dictionary's site.
      dictionary: encodes them; all rows are searched, none is sampled.
      features: indices, 0 <= i < n_features.
      count: examples per feature, at least 1.
      decode: the text of a token id.
      before: tokens shown before the maximum, where the document has them.
      after: tokens shown after it.
      batch: rows read at once.
      splits: which of the store's splits are searched.

    Returns:
      For every feature, in the order given, its examples; an empty list for one that never fires.
    """
    features = list(dict.fromkeys(int(feature) for feature in features))
    out_of_range = [feature for feature in features if not 0 <= feature < dictionary.config.n_features]
    if out_of_range:
        raise ValueError(f"features {out_of_range} are not in 0..{dictionary.config.n_features - 1}")
    if not features:
        return {}
    rows_R = np.sort(np.concatenate([store.rows(split, dictionary.site) for split in splits]))
    encoder, group_D = _Encoder(store, dictionary, features), store.documents.column("group")
    best = [Best(_SPARE * count) for _ in features]
    for start in range(0, len(rows_R), batch):
        rows_B = rows_R[start : start + batch]
        bound_BxK = encoder.bound(rows_B)
        threshold_K = np.array([kept.threshold for kept in best], np.float32)
        for rows_N, acts_NxK in encoder.exact(rows_B[(bound_BxK > threshold_K[None, :]).any(axis=1)]):
            document_N = store.tokens(rows_N)[0]
            for k, kept in enumerate(best):
                kept.add(acts_NxK[:, k], rows_N, document_N, group_D[document_N])
    chosen = [choose(store.documents, kept, *store.tokens(kept.row_N)[:2], count, before, after) for kept in best]
    activation = _neighbours(store, rows_R, encoder, [window for windows in chosen for window in windows])
    return {
        feature: [_example(store, window, activation, k, decode) for window in chosen[k]]
        for k, feature in enumerate(features)
    }


class _Encoder:
    """Activations of K features on rows of a store. Every program has one fixed shape."""

    def __init__(self, store: Store, dictionary: Dictionary, features: Sequence[int]):
        self._store, self._site = store, dictionary.site
        self._dictionary = dictionary
        index_K = np.asarray(features)
        kept = ("W_enc_DxF", "b_enc_F", *dictionary.kind.vectors)
        own = {name: np.asarray(dictionary.arrays[name][..., index_K], np.float32) for name in kept}
        self._W_enc_DxK, self._b_enc_K = dictionary.kind.bound(own)
        if dictionary.config.centred:
            self._b_enc_K = self._b_enc_K - np.asarray(dictionary.b_dec_D[...], np.float32) @ self._W_enc_DxK
        self._signed = dictionary.kind.signed

        def exact(dictionary: Dictionary, x_NxD: jax.Array) -> jax.Array:
            f_NxF = dictionary.encode(x_NxD)
            return jnp.where(dictionary.fires(f_NxF), jnp.abs(f_NxF), 0.0)[:, index_K]

        self._exact = jax.jit(exact)

    def bound(self, rows_B: np.ndarray) -> np.ndarray:
        """What the activations [B, K] cannot exceed."""
        pre_BxK = self._read(rows_B) @ self._W_enc_DxK + self._b_enc_K[None, :]
        return np.maximum(np.abs(pre_BxK) if self._signed else pre_BxK, 0) * _SLACK

    def exact(self, rows_R: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (rows_N, activations_NxK) that cover the rows."""
        for start in range(0, len(rows_R), _ENCODED_AT_ONCE):
            rows_N = rows_R[start : start + _ENCODED_AT_ONCE]
            padded_NxD = np.pad(self._read(rows_N), ((0, _ENCODED_AT_ONCE - len(rows_N)), (0, 0)))
            yield rows_N, np.asarray(self._exact(self._dictionary, padded_NxD))[: len(rows_N)]

    def _read(self, rows_N: np.ndarray) -> np.ndarray:
        return np.asarray(self._store.read(self._site, rows_N), np.float32)


class Best:
    """The largest activations seen so far: ``keep`` from distinct groups, from distinct documents, and from anywhere.

    Attributes:
      value_N, row_N: the activations and their rows, strongest first.
      document_N, group_N: where they are.
      threshold: smaller activations change nothing.
    """

    def __init__(self, keep: int):
        self._keep = keep
        self.value_N, self.threshold = np.zeros(0, np.float32), np.float32(0)
        self.row_N = self.document_N = self.group_N = np.zeros(0, np.int64)

    def add(self, value_B: np.ndarray, row_B: np.ndarray, document_B: np.ndarray, group_B: np.ndarray) -> None:
        """Takes in a batch; only activations above zero count, equals go by row id."""
        fires_B = value_B > 0
        value_C = np.concatenate([self.value_N, value_B[fires_B]])
        row_C = np.concatenate([self.row_N, row_B[fires_B]])
        document_C = np.concatenate([self.document_N, document_B[fires_B]])
        group_C = np.concatenate([self.group_N, group_B[fires_B]])
        order_C = np.lexsort((row_C, -value_C))
        groups, documents = self._first(group_C[order_C]), self._first(document_C[order_C])
        anywhere = np.arange(min(self._keep, len(order_C)))
        kept = order_C[functools.reduce(np.union1d, (groups, documents, anywhere))]
        if len(groups) == self._keep:
            # The weakest of the groups' maxima is at most the weakest of the other two lists.
            self.threshold = value_C[order_C[groups[-1]]]
        self.value_N, self.row_N = value_C[kept], row_C[kept]
        self.document_N, self.group_N = document_C[kept], group_C[kept]

    def _first(self, key_N: np.ndarray) -> np.ndarray:
        """Where the first ``keep`` different keys come first."""
        return np.sort(np.unique(key_N, return_index=True)[1])[: self._keep]


def choose(
    documents: Documents,
    best: Best,
    document_N: np.ndarray,
    position_N: np.ndarray,
    count: int,
    before: int,
    after: int,
) -> list[Window]:
    """Up to ``count`` windows, strongest first: new groups, then new documents, then new places; no context twice.

    Args:
      documents: of the store.
      best: the candidates; ``document_N``, ``position_N``: where they are.
      count: of windows.
      before, after: tokens of a window before and after the candidate, as far as the document has them.
    """
    windows = []
    for document, position in zip(document_N.tolist(), position_N.tolist(), strict=True):
        stop = min(position + after + 1, len(documents[document]))
        windows.append(Window(document, position, max(position - before, 0), stop))
    chosen: list[int] = []
    contexts: set[tuple[int, ...]] = set()
    for distinct in (best.group_N, best.document_N, None):
        for i, window in enumerate(windows):
            if len(chosen) == count:
                break
            if distinct is not None and distinct[i] in distinct[chosen]:
                continue
            shown = (windows[j] for j in chosen if windows[j].document == window.document)
            context = tuple(documents[window.document][window.start : window.stop].tolist())
            if context not in contexts and not any(other.start <= window.position < other.stop for other in shown):
                contexts.add(context)
                chosen.append(i)
    return [windows[i] for i in sorted(chosen)]


def _neighbours(
    store: Store, rows_R: np.ndarray, encoder: _Encoder, windows: Sequence[Window]
) -> dict[tuple[int, int], np.ndarray]:
    """The activations [K] at every (document, position) inside a window that the store holds."""
    wanted = {(window.document, place) for window in windows for place in range(window.start, window.stop)}
    documents = np.unique([window.document for window in windows])
    found: list[int] = []
    for start in range(0, len(rows_R), _ROWS_AT_ONCE):
        rows_N = rows_R[start : start + _ROWS_AT_ONCE]
        document_N, position_N, _ = store.tokens(rows_N)
        for i in np.flatnonzero(np.isin(document_N, documents)):
            if (int(document_N[i]), int(position_N[i])) in wanted:
                found.append(int(rows_N[i]))
    activation = {}
    for rows_B, acts_BxK in encoder.exact(np.asarray(found, np.int64)):
        document_B, position_B, _ = store.tokens(rows_B)
        for document, position, acts_K in zip(document_B.tolist(), position_B.tolist(), acts_BxK, strict=True):
            activation[document, position] = acts_K
    return activation


def _example(store: Store, window: Window, activation: dict, k: int, decode: Callable[[int], str]) -> Example:
    places = range(window.start, window.stop)
    ids = store.documents[window.document]
    return Example(
        document=window.document,
        position=window.position,
        tokens=tuple(decode(int(ids[place])) for place in places),
        activations=tuple(
            float(activation[window.document, place][k]) if (window.document, place) in activation else math.nan
            for place in places
        ),
        peak=window.position - window.start,
        place=store.documents.place(window.document, window.position),
    )

"""Heatmaps of features by tokens of some documents, and the similarity of features to those of other layers.

By token: for every document shown, the features that are more active in it than in all text. By layer: the largest
cosine of a feature's decoder row with those of another layer's dictionary. A squared cosine of random directions has
the distribution Beta(1/2, (d - 1)/2), and the largest of F is below c with the F-th power of its probability:
``layers_bar``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.stats import beta

from saejax.interpret.describe import priority
from saejax.interpret.feature_record import TokenMap
from saejax.interpret.firings import Block
from saejax.interpret.text import CodedText

MAPS = "heatmaps.json"
TOKENS, SHOWN = 48, 24  # first tokens of a document, features of a heatmap
_ROWS = 256  # decoder rows in a block


class TokenMaps:
    """The firings on some documents of the search text.

    Args:
      text: text of the store.
      place: encoded places.
      documents: number of documents to show: those of the largest ``priority``.
    """

    def __init__(self, text: CodedText, place: np.ndarray, documents: int):
        every = np.unique(text.document(place))
        self._text, self._count = text, len(place)
        # By hash instead of a random state, so that all dictionaries of a store show the same documents.
        self._documents = every[np.argsort(priority(every), kind="stable")[::-1][:documents]]
        starts = text.starts(self._documents)
        self._places = [np.arange(start, start + min(TOKENS, 1 + int(text.left(start)))) for start in starts]
        self._is_shown = np.zeros(text.tokens, bool)
        for places in self._places:
            self._is_shown[places] = True
        self._is_encoded = np.isin(np.concatenate([np.zeros(0, np.int64), *self._places]), place)
        self._firings: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._means: list[np.ndarray] = []

    def add(self, block: Block) -> None:
        """Add the firings of a block; blocks come in order."""
        is_shown = self._is_shown[block.place]
        self._firings.append((block.feature[is_shown] + block.first, block.place[is_shown], block.value[is_shown]))
        self._means.append(np.bincount(block.feature, block.value, block.size) / self._count)

    def maps(self, length_F: np.ndarray) -> list[TokenMap]:
        """Return the heatmaps, one for each document.

        Shown are the features with the largest summed activation over the tokens shown, minus the expectation from
        their mean over all text, times the norm of the decoder row; only if positive.

        Args:
          length_F: norms of the decoder rows.
        """
        feature, place, value = (np.concatenate(part) for part in zip(*self._firings, strict=True))
        mean_F, token_maps, first = np.concatenate(self._means), list[TokenMap](), 0
        for document, places in zip(self._documents.tolist(), self._places, strict=True):
            is_encoded = self._is_encoded[first : first + len(places)]
            first += len(places)
            in_document = (place >= places[0]) & (place <= places[-1])
            # Minus the mean over all text, or features that are active everywhere would fill every heatmap.
            excess_F = np.bincount(feature[in_document], value[in_document], len(mean_F)) - is_encoded.sum() * mean_F
            # Dictionaries may scale a feature's activation at will: what it adds to the output also depends on its
            # decoder row.
            excess_F *= length_F
            best = np.argsort(-excess_F, kind="stable")[:SHOWN]
            best = best[excess_F[best] > 0]
            acts_FxT = np.zeros((len(mean_F), len(places)), np.float32)
            acts_FxT[feature[in_document], place[in_document] - places[0]] = value[in_document]
            rows = [
                [float(f"{act:.3g}") if has_act else None for act, has_act in zip(row, is_encoded, strict=True)]
                for row in acts_FxT[best].tolist()
            ]
            tokens = [self._text.texts[i] for i in self._text.back(places, 0)]
            token_maps.append(TokenMap(document=document, tokens=tokens, features=best.tolist(), acts=rows))
        return token_maps


def layers_bar(features: int, width: int, level: float = 0.95) -> float:
    """Return the cosine that the nearest of ``features`` random directions in ``width`` dimensions stays below.

    ``level`` is the probability with which it does.
    """
    if width < 2:
        return 1.0
    return float(np.sqrt(beta.ppf(2 * level ** (1 / features) - 1, 0.5, (width - 1) / 2)))


def across_layers(W_dec_FxD: jax.Array, other_GxD: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return for each decoder row the nearest row of another dictionary by cosine, and the cosine, both [F].

    Args:
      W_dec_FxD: decoder rows; the cosine of a zero row is 0.
      other_GxD: decoder rows of the other dictionary.
    """
    # Rows are filled up to whole blocks, as all steps of ``lax.map`` have one shape.
    rows = -(-len(W_dec_FxD) // _ROWS) * _ROWS
    padded_PxD = jnp.pad(_unit(W_dec_FxD), ((0, rows - len(W_dec_FxD)), (0, 0)))
    largest = jax.device_get(_largest(padded_PxD.reshape(-1, _ROWS, padded_PxD.shape[1]), _unit(other_GxD)))
    ids, cosines = (part.reshape(-1)[: len(W_dec_FxD)] for part in largest)
    return ids, cosines


@jax.jit
def _largest(rows_NxRxD: jax.Array, other_GxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    def block(rows_RxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        # In full float32: accelerators multiply in fewer bits by default, and the cosine is compared with a bar.
        cosine_RxG = jnp.matmul(rows_RxD, other_GxD.T, precision="highest")
        return jnp.argmax(cosine_RxG, axis=1), jnp.max(cosine_RxG, axis=1)

    # Block by block, so that the cosines of all pairs are never in memory at once.
    return lax.map(block, rows_NxRxD)


@jax.jit
def _unit(W_FxD: jax.Array) -> jax.Array:
    length_Fx1 = jnp.linalg.norm(W_FxD, axis=-1, keepdims=True)
    return W_FxD / jnp.where(length_Fx1 > 0, length_Fx1, 1.0)

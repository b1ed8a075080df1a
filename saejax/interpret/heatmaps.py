"""Heatmaps of features by tokens: for some documents, the features that are more active in them than in all text."""

import numpy as np

from saejax.interpret.feature_record import TokenMap
from saejax.interpret.firings import Block, priority
from saejax.interpret.text import CodedText
from saejax.unicode import join_pieces

MAPS = "heatmaps.json"
TOKENS, SHOWN = 48, 24  # first tokens of a document, features of a heatmap


class TokenMaps:
    """The firings on some documents of the search text.

    Args:
      text: text of the store.
      place: encoded places.
      documents: number of documents to show, by falling ``priority``.
    """

    def __init__(self, text: CodedText, place: np.ndarray, documents: int):
        every = np.unique(text.document(place))
        self._text, self._count = text, len(place)
        # By hash instead of a random state, so that all dictionaries of a store show the same documents.
        self._documents = every[np.argsort(priority(every), kind="stable")[::-1][:documents]]
        starts = text.documents.starts_N[self._documents]
        self._places = [np.arange(start, start + min(TOKENS, 1 + int(text.left(start)))) for start in starts]
        self._is_shown = np.zeros(len(text.documents.ids_T), bool)
        for places in self._places:
            self._is_shown[places] = True
        self._is_encoded = [np.isin(places, place) for places in self._places]
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
        """
        feature, place, value = (np.concatenate(part) for part in zip(*self._firings, strict=True))
        mean_F, token_maps = np.concatenate(self._means), list[TokenMap]()
        shown = zip(self._documents.tolist(), self._places, self._is_encoded, strict=True)
        for document, places, is_encoded in shown:
            in_document = (place >= places[0]) & (place <= places[-1])
            # Minus the mean over all text, or features that are active everywhere would fill every heatmap.
            excess_F = np.bincount(feature[in_document], value[in_document], len(mean_F)) - is_encoded.sum() * mean_F
            # Dictionaries may scale a feature's activation at will: its part of the output also depends on its
            # decoder row.
            excess_F *= length_F
            best = np.argsort(-excess_F, kind="stable")[:SHOWN]
            best = best[excess_F[best] > 0]
            acts_FxT = np.zeros((len(mean_F), len(places)), np.float32)
            acts_FxT[feature[in_document], place[in_document] - places[0]] = value[in_document]
            tokens, firsts = join_pieces([self._text.pieces[i] for i in self._text.back(places, 0)])
            # As in contexts, a character that several tokens spell is as active as the most active of these.
            shown_RxC = np.fmax.reduceat(np.where(is_encoded, acts_FxT[best], np.nan), firsts, axis=1)
            rows = [[None if np.isnan(act) else float(f"{act:.3g}") for act in row] for row in shown_RxC.tolist()]
            token_maps.append(TokenMap(document=document, tokens=tokens, features=best.tolist(), acts=rows))
        return token_maps

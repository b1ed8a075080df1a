"""Codes of the places of a text, which detectors read and features are associated with.

A *family* gives every place one code, -1 where there is none: its token, the token's shape, the token before, the pair
or the triple of tokens that ends here, the position in the document, the next token. Codes of a family exclude each
other, so that counts of a set of codes are sums.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np

from saejax.activations.documents import Documents
from saejax.unicode import show_bytes

SHAPES = (
    *("lower-case word", "Capitalised word", "CAPITALS", "letters of no or mixed case", "digits", "punctuation"),
    *("symbol of code", "line break", "white space", "other"),
)
_PATTERNS = {
    "line break": r"\s*[\r\n]\s*",
    "white space": r"\s*",
    "digits": r"[0-9][0-9.,]*",
    "punctuation": r"[.,;:!?'\"’‘“”…–—-]+",
    "symbol of code": r"[()\[\]{}<>=+*/\\|&^%$#@~_`;:,.\"'!?-]+",
}
_SIZE = 2**21  # largest vocabulary for which three ids fit into a code of 63 bits


def shape_of(text: str) -> int:
    """Return the shape of a token: an index in ``SHAPES``, plus their number where it begins with a space."""
    spaced, body = text[:1] == " " and bool(text.strip()), text.strip() or text
    name = next((name for name, pattern in _PATTERNS.items() if re.fullmatch(pattern, body)), None)
    return SHAPES.index(name or _letters(body)) + len(SHAPES) * spaced


def _letters(body: str) -> str:
    if not body.isalpha():
        return "other"
    if body.islower():
        return "lower-case word"
    if len(body) > 1 and body.isupper():
        return "CAPITALS"
    capitalised = body[0].isupper() and (len(body) == 1 or body[1:].islower())
    return "Capitalised word" if capitalised else "letters of no or mixed case"


# The first of equally good families is used.
FAMILIES = ("token", "shape", "previous", "pair", "triple", "position", "next")
# Steps back from a place, the farthest first, to the tokens of which a code of the family is made.
_STEPS = dict(token=(0,), previous=(1,), pair=(1, 0), triple=(2, 1, 0), next=(-1,))


class CodedText:
    """The documents of a store as codes of places, and the text of each token.

    Args:
      documents: the documents.
      pieces: the text of every token id, as ``saejax.models.tokens.token_piece`` gives it.
    """

    def __init__(self, documents: Documents, pieces: Sequence[str]):
        assert len(pieces) <= _SIZE
        self.documents, self.pieces, lengths = documents, pieces, documents.lengths_N
        self.texts = list(map(show_bytes, pieces))
        starts = np.repeat(documents.starts_N, lengths)  # documents of a store are contiguous
        self._position = (np.arange(len(documents.ids_T)) - starts).astype(np.int32)
        self._last = np.repeat(lengths, lengths).astype(np.int32) - 1 - self._position  # tokens still to come

    @functools.cached_property
    def _shapes(self) -> np.ndarray:
        return np.array([shape_of(text) for text in self.texts], np.int64)

    def document(self, place: np.ndarray) -> np.ndarray:
        """Return the documents of places."""
        return np.searchsorted(self.documents.starts_N, place, side="right") - 1

    def position(self, place: np.ndarray) -> np.ndarray:
        """Return the positions of places in their documents, from 0."""
        return self._position[place].astype(np.int64)

    def left(self, place: np.ndarray) -> np.ndarray:
        """Return the number of tokens of the document that follow each place."""
        return self._last[place].astype(np.int64)

    def back(self, place: np.ndarray, steps: int) -> np.ndarray:
        """Return the token id ``steps`` before each ``place``, after it if negative; -1 outside of the document."""
        inside = self._position[place] >= steps if steps > 0 else self._last[place] >= -steps
        return np.where(inside, self.documents.ids_T[np.where(inside, place - steps, 0)], -1).astype(np.int64)

    def code(self, family: str, place: np.ndarray) -> np.ndarray:
        """Return the code of a family of ``FAMILIES`` at each ``place``, int64."""
        if family == "position":
            return self.position(place)
        if family == "shape":
            return self._shapes[self.back(place, 0)]
        code, inside = np.zeros(len(place), np.int64), np.ones(len(place), bool)
        for steps in _STEPS[family]:
            ids = self.back(place, steps)
            code, inside = code * len(self.texts) + ids, inside & (ids >= 0)
        return np.where(inside, code, -1)

    def says(self, family: str, code: int) -> str:
        """Return a code of a ``family`` in words."""
        if family == "position":
            return str(code)
        if family == "shape":
            spaced, shape = divmod(code, len(SHAPES))
            return SHAPES[shape] + (" after a space" if spaced else "")
        spelled: list[str] = []
        for _ in _STEPS[family]:  # the last token is the lowest digit
            code, token = divmod(code, len(self.texts))
            spelled.insert(0, self.pieces[token])
        return f"“{show_bytes(''.join(spelled))}”"


class CodeCounts:
    """Frequency of each code of a family at some places.

    Args:
      code: code at each of the places; -1 is not counted.
    """

    def __init__(self, code: np.ndarray):
        self._code, self._count = np.unique(code[code >= 0], return_counts=True)
        self.places = int(self._count.sum())

    def __getitem__(self, code: np.ndarray) -> np.ndarray:
        """Return the counts of codes, 0 for a code that does not occur."""
        if not len(self._code):
            return np.zeros(len(code), np.int64)
        index = np.minimum(np.searchsorted(self._code, code), len(self._code) - 1)
        return np.where(self._code[index] == code, self._count[index], 0)

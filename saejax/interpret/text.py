"""Codes of the places of a text, which detectors read and features are associated with.

A *family* gives every place one code, -1 where there is none: its token, the token's shape, the token before, the pair
or the triple of tokens that ends here, the position in the document, the next token. Codes of a family exclude each
other, so that counts of a set of codes are sums.
"""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from saejax.activations.documents import Documents

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


class CodedText:
    """The documents of a store as codes of places."""

    def __init__(self, documents: Documents, texts: Sequence[str]):
        assert len(texts) <= _SIZE
        self.texts, self._vocabulary = texts, len(texts)
        self._ids = documents.ids_T
        self._starts = documents.starts_N  # contiguous in a store
        lengths = documents.lengths_N
        self._position = (np.arange(len(self._ids)) - np.repeat(documents.starts_N, lengths)).astype(np.int32)
        self._last = np.repeat(lengths, lengths).astype(np.int32) - 1 - self._position  # tokens still to come

    @functools.cached_property
    def _shapes(self) -> np.ndarray:
        return np.array([shape_of(text) for text in self.texts], np.int64)

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return len(self._ids)

    def starts(self, document: np.ndarray) -> np.ndarray:
        """Return the places of documents' first tokens."""
        return self._starts[document]

    def document(self, place: np.ndarray) -> np.ndarray:
        """Return the documents of places."""
        return np.searchsorted(self._starts, place, side="right") - 1

    def position(self, place: np.ndarray) -> np.ndarray:
        """Return the positions of places in their documents, from 0."""
        return self._position[place].astype(np.int64)

    def left(self, place: np.ndarray) -> np.ndarray:
        """Return the number of tokens of the document that follow each place."""
        return self._last[place].astype(np.int64)

    def back(self, place: np.ndarray, steps: int) -> np.ndarray:
        """Return the token id ``steps`` before each ``place``, after it if negative; -1 outside of the document."""
        inside = self._position[place] >= steps if steps > 0 else self._last[place] >= -steps
        return np.where(inside, self._ids[np.where(inside, place - steps, 0)], -1).astype(np.int64)

    def _tuple(self, place: np.ndarray, length: int) -> np.ndarray:
        """Return the last ``length`` tokens up to places as one number; -1 where the document has fewer."""
        code = np.zeros(len(place), np.int64)
        for steps in reversed(range(length)):
            # Farthest token first, so that the last token is the lowest digit, as ``_ids_of`` reads it.
            code = code * self._vocabulary + self.back(place, steps)
        return np.where(self._position[place] >= length - 1, code, -1)

    def code(self, family: str, place: np.ndarray) -> np.ndarray:
        """Return the code of a family of ``FAMILIES`` at each ``place``, int64."""
        return FAMILIES[family][0](self, place)

    def says(self, family: str, code: int) -> str:
        """Return a code of a ``family`` in words."""
        return FAMILIES[family][1](self, code)

    def quoted(self, *ids: int) -> str:
        """Return tokens in quotes."""
        return "“" + "".join(self.texts[i] for i in ids) + "”"

    def _ids_of(self, code: int, length: int) -> list[int]:
        return [code // self._vocabulary**steps % self._vocabulary for steps in reversed(range(length))]


def _shape_in_words(text: CodedText, code: int) -> str:
    spaced, shape = divmod(code, len(SHAPES))
    return SHAPES[shape] + (" after a space" if spaced else "")


Codes = Callable[[CodedText, np.ndarray], np.ndarray]
Words = Callable[[CodedText, int], str]

# The first of equally good families is used.
FAMILIES: dict[str, tuple[Codes, Words]] = {
    "token": (lambda text, place: text.back(place, 0), lambda text, code: text.quoted(code)),
    "shape": (lambda text, place: text._shapes[text.back(place, 0)], _shape_in_words),
    "previous": (lambda text, place: text.back(place, 1), lambda text, code: text.quoted(code)),
    "pair": (lambda text, place: text._tuple(place, 2), lambda text, code: text.quoted(*text._ids_of(code, 2))),
    "triple": (lambda text, place: text._tuple(place, 3), lambda text, code: text.quoted(*text._ids_of(code, 3))),
    "position": (lambda text, place: text.position(place), lambda text, code: str(code)),
    "next": (lambda text, place: text.back(place, -1), lambda text, code: text.quoted(code)),
}


class CodeCounts:
    """Frequency of each code of a family at some places.

    Args:
      code: code at each of the places; -1 is not counted.
    """

    def __init__(self, code: np.ndarray):
        self._code, self._count = np.unique(code[code >= 0], return_counts=True)
        self.places = int(self._count.sum())

    @property
    def codes(self) -> int:
        """Number of distinct codes."""
        return len(self._code)

    def __getitem__(self, code: np.ndarray) -> np.ndarray:
        """Return the counts of codes, 0 for a code that does not occur."""
        if not len(self._code):
            return np.zeros(len(code), np.int64)
        index = np.minimum(np.searchsorted(self._code, code), len(self._code) - 1)
        return np.where(self._code[index] == code, self._count[index], 0)

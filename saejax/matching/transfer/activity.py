"""Text that models read together, and the activations of features on it.

Models with one tokenizer share all tokens. With different ones, two tokens are a pair if they end after the same
character of the same text: there both models have read the same text. End offsets need no search, and no rule for the
space before a word, which some tokenizers attach to the word and some do not. Of several tokens that end at the same
character (parts of one character) the last is used, which has read all of it. Special tokens are left out.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.files import whole_file
from saejax.interpret.firings import encode_tokens
from saejax.matching.rows import CentredRows
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import even_batches, round_length
from saejax.models.tokens import Tokens, bos_tokens, own_beginnings, pad, token_text
from saejax.parallel.mesh import document_devices

_PROGRAM = 1024  # tokens that run in about the time of compiling the programs of one more shape
MIN_FIRINGS = 10  # on each half of the text: correlations of fewer firings measure the size of the text
_CHARACTERS = 5  # of text per token


@dataclasses.dataclass(frozen=True)
class ReadText:
    """Texts as one model reads them: N tokens, special ones left out."""

    #: token ids of each piece that the model runs on, special tokens first; a text's own one stands in their place
    pieces: tuple[np.ndarray, ...]
    front: int  #: number of these special tokens
    text_N: np.ndarray  #: index of the text of each token, int64
    end_N: np.ndarray  #: number of characters of the text up to the end of the token, int64


def first_texts(texts: Sequence[str], tokens: int) -> list[str]:
    """Return the first texts of a list with about ``tokens`` tokens together; at least one text."""
    # By characters: models split the same text into different numbers of tokens.
    ends = np.cumsum([len(text) for text in texts])
    return list(texts[: int(np.searchsorted(ends, _CHARACTERS * tokens)) + 1])


def read_text(tokenizer: Any, texts: Sequence[str], context: int, bos: str = "auto") -> ReadText:
    """Split texts into tokens and these into pieces.

    Args:
      tokenizer: tokenizer of the model.
      texts: the texts.
      context: largest number of tokens of a piece, special ones included.
      bos: how a piece begins, see ``tokens.encode``.

    Raises:
      UserError: the tokenizer reports no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "this model's tokenizer reports no character offsets, so its features cannot be compared by activity: "
            "use a fast tokenizer"
        )
    front = bos_tokens(tokenizer, bos)
    beginnings = own_beginnings(tokenizer, bos)
    as_text, size = token_text(tokenizer), max(context - len(front), 1)
    pieces, numbers, places = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, text in enumerate(texts):
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, ends = read["input_ids"], [end for _, end in read["offset_mapping"]]
        begin = front
        if ids and ids[0] in beginnings:  # a special token of its own stands in the place of BOS
            begin = ids[:1]
        if begin and ids[: len(begin)] == begin:  # the text's own; a second one would follow it
            ids, ends = ids[len(begin) :], ends[len(begin) :]
        ends = [_whole_end(text, end, as_text(token)) for token, end in zip(ids, ends, strict=True)]
        for start in range(0, len(ids), size):
            pieces.append(np.array([*(front if start else begin), *ids[start : start + size]], np.int32))
        numbers.append(np.full(len(ids), number))
        places.append(np.array(ends, np.int64))
    return ReadText(tuple(pieces), len(front), np.concatenate(numbers), np.concatenate(places))


def _whole_end(text: str, end: int, token: str) -> int:
    """Return where a token ends; byte-level tokenizers leave its trailing spaces out of their offsets."""
    blanks = token[len(token.rstrip()) :]
    left_out = token.strip() and blanks and not text[:end].endswith(blanks) and text[end:].startswith(blanks)
    return end + len(blanks) if left_out else end


def aligned(first: ReadText, second: ReadText) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of tokens of two models that end at the same characters, as indices of each model's tokens."""
    (key_U, at_U), (key_V, at_V) = _places(first), _places(second)
    _, first_N, second_N = np.intersect1d(key_U, key_V, assume_unique=True, return_indices=True)
    return at_U[first_N], at_V[second_N]


def _places(read: ReadText) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters at which tokens end, each once, and the last token that ends there."""
    key_N = read.text_N << 32 | read.end_N
    # From the back: of several tokens in a character (bytes), the last has read all of it.
    key_U, from_back_U = np.unique(key_N[::-1], return_index=True)
    return key_U[key_U & (2**32 - 1) > 0], (len(key_N) - 1 - from_back_U)[key_U & (2**32 - 1) > 0]


@dataclasses.dataclass(frozen=True)
class Activity:
    """A dictionary's activations on a model's tokens."""

    f_NxF: sparse.csr_array  #: activations, sparse, fp32
    real_N: np.ndarray  #: tokens that are no attention sinks

    def firings(self, token_N: np.ndarray) -> np.ndarray:
        """Return on how many of some tokens each feature fires, [F]."""
        return np.bincount(self.f_NxF[token_N].indices, minlength=self.f_NxF.shape[1])

    def rows(self, token_N: np.ndarray, compared_F: np.ndarray) -> CentredRows:
        """Return centred activations of unit length on some tokens.

        Args:
          token_N: indices of tokens.
          compared_F: features to compare; the rows of others are 0.
        """
        return CentredRows.of(self.f_NxF[token_N], compared_F)

    def save(self, path: Path, **more: Any) -> None:
        """Write the activity, and more arrays by name, to a .npz file."""
        f = self.f_NxF
        parts = dict(data=f.data, indices=f.indices, indptr=f.indptr, shape=f.shape, real_N=self.real_N)
        with whole_file(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **parts, **more)

    @classmethod
    def load(cls, path: Path) -> "Activity":
        """Read an activity that ``save`` wrote."""
        with np.load(path) as parts:
            arrays = parts["data"], parts["indices"], parts["indptr"]
            return cls(sparse.csr_array(arrays, shape=tuple(parts["shape"])), parts["real_N"])


def site_values(
    lm: LanguageModel,
    read: ReadText,
    sites: Sequence[str],
    batch_tokens: int,
    check_stop: Callable[[], None] = lambda: None,
) -> Mapping[str, np.ndarray]:
    """Return the values of some sites at every token of the texts, special tokens left out, fp32 [N, D] each.

    ``check_stop`` is called before each batch; it may raise to stop.
    """
    starts = np.cumsum([0, *(len(piece) - read.front for piece in read.pieces)])
    values: dict[str, np.ndarray] = {}
    lengths = np.array([round_length(len(piece)) for piece in read.pieces], np.int64)
    for chosen, rows, length in even_batches(lengths, batch_tokens, document_devices(lm.mesh), _PROGRAM):
        check_stop()
        filled = pad([*(read.pieces[i].tolist() for i in chosen), *[[0]] * (rows - len(chosen))])
        ids_BxT = np.pad(filled.ids_BxT, ((0, 0), (0, length - filled.ids_BxT.shape[1])))
        output = lm(Tokens(ids_BxT, filled.lengths_B), capture=sites, logits=False)
        for site in sites:
            value_BxTxD = np.asarray(output.sites[site], np.float32)
            # Not all sites have the stream's width: sites of heads have the width of all heads side by side.
            values.setdefault(site, np.zeros((starts[-1], value_BxTxD.shape[-1]), np.float32))
            for row, piece in enumerate(chosen):
                # Without special tokens: they end at no character, so no other model's token is their pair.
                part_NxD = value_BxTxD[row, read.front : filled.lengths_B[row]]
                values[site][starts[piece] : starts[piece] + len(part_NxD)] = part_NxD
    return values


def encode(dictionary: Dictionary, x_NxD: np.ndarray, batch_tokens: int, y_NxO: np.ndarray | None = None) -> Activity:
    """Return the activity of a dictionary on values of its site and target; see ``encode_tokens``."""
    return Activity(*encode_tokens(dictionary, x_NxD, batch_tokens, y_NxO))

"""Text that models read together: its tokens for each model, and the pairs of tokens that end at the same character.

Models with one tokenizer share all tokens. With different ones, two tokens are a pair if they end after the same
character of the same text: there both models have read the same text. End offsets need no search, and no rule for the
space before a word, which some tokenizers attach to the word and some do not. Of several tokens that end at the same
character (parts of one character) the last is used, which has read all of it. Special tokens are left out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.models.tokens import bos_tokens, token_text

_CHARACTERS = 5  # of text per token


@dataclasses.dataclass(frozen=True)
class ReadText:
    """Texts as one model reads them: N tokens, special ones left out.

    Attributes:
      pieces: token ids of each piece that the model runs on, special tokens first.
      front: number of these special tokens.
      text_N: index of the text of each token, int64.
      end_N: number of characters of the text up to the end of the token, int64.
    """

    pieces: tuple[np.ndarray, ...]
    front: int
    text_N: np.ndarray
    end_N: np.ndarray


def first_texts(texts: Sequence[str], tokens: int) -> list[str]:
    """Return the first texts of a list with about ``tokens`` tokens together; at least one text."""
    # By characters: models split the same text into different numbers of tokens.
    ends = np.cumsum([len(text) for text in texts])
    return list(texts[: int(np.searchsorted(ends, _CHARACTERS * tokens)) + 1])


def read_text(tokenizer: Any, texts: Sequence[str], context: int) -> ReadText:
    """Split texts into tokens and these into pieces.

    Args:
      tokenizer: tokenizer of the model.
      texts: the texts.
      context: largest number of tokens of a piece, special ones included.

    Raises:
      UserError: the tokenizer reports no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "this model's tokenizer reports no character offsets, so its features cannot be compared by activity: "
            "use a fast tokenizer"
        )
    front = bos_tokens(tokenizer)
    as_text, size = token_text(tokenizer), max(context - len(front), 1)
    pieces, numbers, places = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, text in enumerate(texts):
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, ends = read["input_ids"], [end for _, end in read["offset_mapping"]]
        ends = [_whole_end(text, end, as_text(token)) for token, end in zip(ids, ends, strict=True)]
        pieces += [np.array([*front, *ids[i : i + size]], np.int32) for i in range(0, len(ids), size)]
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
    (key_U, at_U), (other_V, at_V) = _places(first), _places(second)
    _, own_N, others_N = np.intersect1d(key_U, other_V, assume_unique=True, return_indices=True)
    return at_U[own_N], at_V[others_N]


def _places(read: ReadText) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters at which tokens end, each once, and the last token that ends there."""
    key_N = read.text_N << 32 | read.end_N
    # From the back: of several tokens in a character (bytes), the last has read all of it.
    key_U, from_back_U = np.unique(key_N[::-1], return_index=True)
    return key_U[key_U & (2**32 - 1) > 0], (len(key_N) - 1 - from_back_U)[key_U & (2**32 - 1) > 0]

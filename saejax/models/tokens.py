"""Prompts as token ids: special tokens, answers that continue a text, batches of few shapes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from saejax.arguments import as_numbers
from saejax.errors import UserError, one_of
from saejax.short_reprs import has_short_repr
from saejax.unicode import has_surrogates, show_bytes, text_of_piece

BOS = ("auto", "always", "never")  # how texts begin, see ``encode``


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Tokens:
    """A batch of prompts, padded on the right."""

    ids_BxT: np.ndarray  #: int32 token ids; what stands after a prompt's end is without effect
    lengths_B: np.ndarray  #: int32 number of tokens of each prompt, 1 to T

    @property
    def mask_BxT(self) -> np.ndarray:
        """True at real positions."""
        return np.arange(self.ids_BxT.shape[1])[None, :] < self.lengths_B[:, None]

    @property
    def last_B(self) -> np.ndarray:
        """Index of each prompt's last token."""
        return self.lengths_B - 1

    def pad_left(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids padded on the left, int32 [B, width], and the number of padding tokens of each prompt, [B]."""
        ids_BxT = np.zeros((len(self.lengths_B), width), np.int32)
        for row, ids, length in zip(ids_BxT, self.ids_BxT, self.lengths_B, strict=True):
            row[width - length :] = ids[:length]
        return ids_BxT, (width - self.lengths_B).astype(np.int32)

    def check(self, vocab: int, context: int) -> None:
        """Raise a ``UserError`` unless the prompts fit a model with ``vocab`` token ids and this context, in tokens."""
        ids, lengths = self.ids_BxT, self.lengths_B
        if ids.ndim != 2 or lengths.shape != ids.shape[:1] or 0 in ids.shape:
            raise UserError(f"tokens have the shapes {ids.shape} and {lengths.shape}: expected [B, T] and [B]")
        if lengths.min() < 1 or lengths.max() > min(ids.shape[1], context):
            shortest, longest = int(lengths.min()), int(lengths.max())
            counted = f"{shortest} to {longest}" if len(lengths) > 1 else str(longest)
            raise UserError(f"prompts have {counted} tokens: expected 1 to {min(ids.shape[1], context)}")
        real = ids[self.mask_BxT]
        if real.min() < 0 or real.max() >= vocab:
            raise UserError(
                f"token ids are {real.min()} to {real.max()}: expected 0 to {vocab - 1}, the ids of this model"
            )


def as_tokens(tokens: Any, tokenizer: Any = None) -> Tokens:
    """Return a batch of prompts as it is, one of lists of token ids, or one that a tokenizer of transformers returns.

    Of the last, with padding on either side, ``attention_mask`` says which tokens are real. Rows without a mask are
    taken as they are; a warning tells where the tokenizer's padding token stands at the ends of some.

    Raises:
      UserError: it is none of these, or a prompt is empty.
    """
    if isinstance(tokens, Tokens):
        return tokens
    mask = None
    if isinstance(tokens, Mapping) and "input_ids" in tokens:
        tokens, mask = tokens["input_ids"], tokens.get("attention_mask")
        tokens = np.asarray(tokens) if _are_ids(tokens) else _drop_padding(tokens, mask)
    rows = tokens
    if not isinstance(tokens, list | tuple):
        array = as_numbers(tokens, whole=True)
        rows = [] if array is None or not array.ndim else array
    if len(rows) and all(map(_are_ids, rows)):
        if mask is None:
            _tell_padding(rows, getattr(tokenizer, "pad_token_id", None))
        # What is no id in any model is left for the check by the model.
        return pad([np.clip(np.asarray(row).astype(np.int64), -1, np.iinfo(np.int32).max) for row in rows])
    kind, expected = type(tokens).__name__, "the result of lm.tokenize(texts), or a list of lists of token ids"
    if _are_ids(rows):
        raise UserError(f"tokens is one list of {len(rows)} ids: expected {expected}; of one prompt give [tokens]")
    if any(hasattr(row, "__len__") and not len(row) for row in rows):
        raise UserError(f"tokens has an empty prompt: expected {expected}")
    raise UserError(f"tokens is a {kind}: expected {expected}")


def _drop_padding(ids: Any, mask: Any) -> list[list[int]]:
    """Return the tokens of each row where its mask is not 0, or all of them without a mask."""
    try:
        rows = [np.asarray(row) for row in ids]
        masks = [np.ones(row.shape, bool) for row in rows] if mask is None else [np.asarray(real) != 0 for real in mask]
    except (TypeError, ValueError):
        rows = masks = []
    shapes = [row.shape for row in rows]
    if not rows or shapes != [real.shape for real in masks] or {*map(len, shapes)} != {1}:
        raise UserError(
            "input_ids and attention_mask are no lists of token ids and of as many zeros and ones: expected those that "
            "a tokenizer returns for a list of texts"
        )
    for number, real in enumerate(masks):
        if np.count_nonzero(np.diff(real)) > 1 + (not real[:1].any()):
            raise UserError(f"attention_mask of prompt {number} is no mask of padding: expected 1 at its own tokens")
    return [row[real].tolist() for row, real in zip(rows, masks, strict=True)]


def _tell_padding(rows: Sequence[Any] | np.ndarray, padding: int | None) -> None:
    """Warn where some rows of one length begin or end in the padding token, which would be read as text."""
    if padding is None or len(rows) < 2 or len(set(map(len, rows))) > 1:
        return
    for place in (0, -1):
        if 0 < (count := sum(int(row[place]) == padding for row in rows)) < len(rows):
            where = "end" if place else "begin"
            logging.warning(
                "%d of %d prompts %s in the padding token %d, which is read as text: give lm.tokenize(texts), lists "
                "without padding, or the tokenizer's whole result with its attention_mask",
                count,
                len(rows),
                where,
                padding,
            )


def _are_ids(row: object) -> bool:
    """Return whether these are the token ids of one prompt, at least one."""
    ids = as_numbers(row, whole=True)
    return ids is not None and ids.ndim == 1 and ids.size > 0


def pad(sequences: Sequence[Sequence[int] | np.ndarray]) -> Tokens:
    """Pad token id sequences of any length above 0 into one batch."""
    lengths_B = np.array([len(sequence) for sequence in sequences], np.int32)
    ids_BxT = np.zeros((len(sequences), int(lengths_B.max())), np.int32)
    for row, sequence in zip(ids_BxT, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Tokens(ids_BxT, lengths_B)


def tokenize(tokenizer: Any, texts: Sequence[str], context: int, bos: str = "auto") -> Tokens:
    """Tokenise texts as the model expects them, special tokens included; for ``bos`` see ``encode``.

    Raises:
      UserError: there is no tokenizer, or a text is empty or longer than the context, in tokens.
    """
    texts = _as_list(texts)
    sequences = _encode_all(tokenizer, texts, bos)
    for number, sequence in enumerate(sequences):
        if len(sequence) > context:
            raise UserError(
                f"{_number_of(texts, number)} has {len(sequence)} tokens, more than the model's context of {context}: "
                "shorten it"
            )
    return pad(sequences)


def tokenize_in_pieces(
    tokenizer: Any, texts: Sequence[str], context: int, bos: str = "auto"
) -> tuple[Tokens, np.ndarray]:
    """Tokenise texts as ``tokenize`` does, each split into pieces of at most ``context`` tokens.

    Every piece begins with the special tokens with which a text begins, as documents of ``--corpus.path`` do; the first
    one of a text that begins with a special token of its own as ``encode`` leaves it.

    Returns:
      The pieces, and the text that each is of, int [pieces].

    Raises:
      UserError: there is no tokenizer, a text is empty, or the context has no room for text.
    """
    sequences, front = _encode_all(tokenizer, _as_list(texts), bos), bos_tokens(tokenizer, bos)
    size = context - len(front)
    if size < 1:
        raise UserError(f"context is {context}: expected at least {len(front) + 1} tokens")
    pieces: list[list[int]] = []
    source: list[int] = []
    for number, sequence in enumerate(sequences):
        begins = sequence[: len(front)] == front
        text = sequence[len(front) :] if begins else sequence
        of_text = [front + text[start : start + size] for start in range(0, max(len(text), 1), size)]
        of_text[0] = of_text[0] if begins else text[:size]
        pieces += of_text
        source += [number] * len(of_text)
    return pad(pieces), np.array(source)


def _as_list(texts: Any) -> list[Any]:
    """Return texts as a list; raise a ``UserError`` for a single string, or for what is no collection of texts."""
    if isinstance(texts, str):
        raise UserError("texts is one string: expected a list of them")
    try:
        return list(texts)
    except TypeError:
        raise UserError(f"texts is {texts!r:.60}: expected a list of texts") from None


def _encode_all(tokenizer: Any, texts: list[str], bos: str) -> list[list[int]]:
    """Return the token ids of each text; raise a ``UserError`` if there is none, or one of them is empty."""
    if not texts:
        raise UserError("there are no texts to tokenize: expected at least one")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {number} of {len(texts)} is a {type(text).__name__}: expected a text")
    sequences = [encode(tokenizer, text, bos) for text in texts]
    for number, (text, sequence) in enumerate(zip(texts, sequences, strict=True)):
        if not text or not sequence:
            raise UserError(f"{_number_of(texts, number)} has no tokens: expected at least one")
    return sequences


def _number_of(texts: Sequence[str], number: int) -> str:
    """Return which of some texts this is, with its beginning."""
    text = texts[number]
    start = text if len(text) <= 40 else text[:40] + "..."
    return f"text {number} of {len(texts)} ({start!r})"


def encode(tokenizer: Any, text: str, bos: str = "auto") -> list[int]:
    """Return the token ids of a text that a model continues.

    Special tokens that the tokenizer puts after a text are left out: a context that ends in one has ended.

    Args:
      tokenizer: tokenizer of the model; None: it has none.
      text: may begin with the text of the BOS token, as chat templates and Neuronpedia's prompts do; it then gets no
        second one.
      bos: "auto", the special tokens that the tokenizer puts in front; "always", these or, where it puts none and the
        text begins with no special token, the BOS token, as circuit-tracer does; "never", none.

    Raises:
      UserError: there is no tokenizer, or no BOS token though one is asked for, or the text is not valid Unicode.
    """
    if tokenizer is None:
        raise UserError("this model has no tokenizer: give token ids, with saejax.models.tokens.pad")
    if not isinstance(text, str):
        raise UserError(f"the text is {text!r:.60}: expected one text")
    # verbose=False: the tokenizer's own warning about long texts goes to the log; ours is an error.
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except (TypeError, UnicodeError):
        if not has_surrogates(text):
            raise
        raise UserError(f"the text {text!r:.60} has an unpaired surrogate: expected valid Unicode") from None
    except Exception as error:
        if type(error) is not Exception:  # what the library of tokenizers raises
            raise
        raise UserError(f"the model's tokenizer cannot read the text {text!r:.60}: {error}") from None
    front = bos_tokens(tokenizer, bos)
    if ids and ids[0] in own_beginnings(tokenizer, bos):
        return ids
    return ids if ids[: len(front)] == front else front + ids


def make_chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], advice: str, **options: Any) -> str:
    """Return the text that a tokenizer's chat template makes of messages, special tokens included.

    Args:
      tokenizer: tokenizer of the model.
      messages: with a role and a content each.
      advice: what to do where it cannot make a text of them.
      **options: further arguments of the template.

    Raises:
      UserError: it cannot.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # of any type: a template is a program that refuses roles in its own words
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer cannot make text of the messages of a chat ({reason}): {advice}") from None


def own_beginnings(tokenizer: Any, bos: str) -> frozenset[int]:
    """Return the special tokens of which a text that begins with one gets no BOS; for ``bos`` see ``encode``."""
    if bos != "always" or bos_tokens(tokenizer):
        return frozenset()
    return frozenset(getattr(tokenizer, "all_special_ids", ()))


def bos_tokens(tokenizer: Any, bos: str = "auto") -> list[int]:
    """Return the special tokens with which every text begins; for ``bos`` see ``encode``.

    In place of a BOS token that the tokenizer lacks stands the one of padding, else the one that ends a text.

    Raises:
      UserError: there is none of them though one is asked for.
    """
    if one_of(bos, BOS, "bos") == "never":
        return []
    # Compared, as tokenizers have no attribute that says what they put in front, and some put tokens behind, too.
    whole, plain = _with_and_without_special(tokenizer)
    starts = range(len(whole) - len(plain), -1, -1)
    fronts: list[list[int]] = [whole[:start] for start in starts if whole[start : start + len(plain)] == plain]
    if any(fronts[:1]) or bos == "auto":
        return fronts[0] if fronts else []
    # In the order of circuit-tracer.
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        if (token := getattr(tokenizer, name)) is not None:
            return [token]
    raise UserError("the tokenizer has no BOS token: expected bos='auto' or 'never'")


def _with_and_without_special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of a text with the special tokens that the tokenizer adds, and without; [] if it reads none."""

    def texts() -> Iterator[str]:
        yield "a"
        # A vocabulary of digits, say, has no letter: then one of its own tokens.
        yield from map(tokenizer.decode, sorted({*range(len(tokenizer))} - {*tokenizer.all_special_ids}))

    for text in texts():
        try:
            whole, plain = (tokenizer(text, add_special_tokens=added)["input_ids"] for added in (True, False))
        except Exception as error:
            if type(error) is not Exception:  # what the library of tokenizers raises
                raise
            continue
        if plain:
            return whole, plain
    return [], []


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the id of each special token by its text, also of those that have no role such as BOS or padding."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


# What an answer is appended to where no context is given: the first of these with which it does not merge.
_NEUTRAL_CONTEXTS = ("a", "\n", "(", "=")


def continuation_ids(tokenizer: Any, answer: str, context: str | None = None) -> list[int]:
    """Return the token ids with which a text goes on when an answer is appended to it.

    An answer that is tokenised alone may begin otherwise: SentencePiece tokenizers put a marker of a word's beginning
    before it, and others merge its digits or letters with the context's.

    Args:
      tokenizer: tokenizer of the model.
      answer: taken as it is written: " Paris" and "Paris" differ.
      context: the text before it; None: any.

    Returns:
      The ids after the context's ids; [] if the context's last tokens are other ones when the answer follows.

    Raises:
      UserError: the answer is empty, or there is no tokenizer.
    """
    if not answer:
        raise UserError("the answer '' has no tokens: expected at least one")
    contexts = [context]
    if context is None:
        # Not after a letter: a word without a space would merge with it.
        contexts = list(_NEUTRAL_CONTEXTS if answer[0].isspace() else _NEUTRAL_CONTEXTS[1:])
    for before in contexts:
        try:
            ids, whole = encode(tokenizer, before or ""), encode(tokenizer, (before or "") + answer)
        except UserError:
            if context is not None:
                raise
            continue  # a vocabulary may lack it
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            return whole[len(ids) :]
    return [] if context is not None else encode(tokenizer, answer, bos="never")


def is_known(tokenizer: Any, answer: str, ids: Sequence[int]) -> bool:
    """Return whether the first of an answer's ids is a token of its own, not the one of all unknown texts.

    Args:
      tokenizer: tokenizer of the model.
      answer: the text.
      ids: its token ids.
    """
    unknown = getattr(tokenizer, "unk_token", None)  # of some tokenizers the token that ends a text, too
    return not ids or ids[0] != getattr(tokenizer, "unk_token_id", None) or (unknown is not None and unknown in answer)


def single_token_id(tokenizer: Any, spellings: Sequence[str]) -> int:
    """Return the id of the first of an answer's spellings that is one token.

    Args:
      tokenizer: tokenizer of the model.
      spellings: taken as they are written, as in ``continuation_ids``.

    Raises:
      UserError: each is several tokens, of which other answers may have the first, too, or unknown to the tokenizer; or
        there is no tokenizer.
    """
    ids = [continuation_ids(tokenizer, text) for text in spellings]
    for text, answer_ids in zip(spellings, ids, strict=True):
        if len(answer_ids) == 1 and is_known(tokenizer, text, answer_ids):
            return answer_ids[0]
    pieces = ", ".join(f"'{token_text(tokenizer)(index)}' ({index})" for index in ids[0])
    what = f"{len(ids[0])} tokens" if len(ids[0]) != 1 else "unknown to the tokenizer"
    raise UserError(
        f"the answer {spellings[0]!r} is {what}: {pieces}; give the id of one of them, or a word of one token"
    )


def text_of(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of token ids as it is, special tokens and spaces before punctuation included."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def continuation_text(tokenizer: Any, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
    """Return what token ids add to the text before them: with the space that decoding drops where a text begins.

    Args:
      tokenizer: tokenizer of the model.
      ids: token ids.
      skip_special_tokens: leave out special tokens.
    """
    options: dict[str, Any] = dict(clean_up_tokenization_spaces=False)
    text = str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **options))
    first = [int(token) for token in ids[:1]]
    is_dropped = first and token_piece(tokenizer)(first[0]) == f" {tokenizer.decode(first, **options)}"
    return f" {text}" if is_dropped else text


def token_text(tokenizer: Any) -> Callable[[int], str]:
    r"""Return a function from a token id to its text, its leading space included; half a character is ``\xe0\xb8``."""
    as_piece = token_piece(tokenizer)
    return lambda token: show_bytes(as_piece(token))


def token_piece(tokenizer: Any) -> Callable[[int], str]:
    """Return a function from a token id to its text, in which bytes of an incomplete character are surrogates.

    Texts of successive tokens become readable by ``saejax.unicode.join_pieces``; ``token_text`` shows one token.

    Raises:
      UserError: there is no tokenizer.
    """
    if tokenizer is None:
        raise UserError("this model has no tokenizer, so that its tokens have no texts: copy it beside the weights")

    def text(token: int) -> str:
        """Return the text of a token id."""
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # embeddings may be padded with ids that the tokenizer lacks
            return f"<token {token}>"
        decoded = text_of_piece(piece, tokenizer.decode([token], clean_up_tokenization_spaces=False))
        # SentencePiece tokenizers drop the first space of what they decode, of a token of several spaces, too.
        dropped = isinstance(piece, str) and piece.startswith("▁")
        dropped &= not decoded.startswith(" ") or f" {decoded}" == str(piece).replace("▁", " ")
        return f" {decoded}" if dropped else decoded

    return text

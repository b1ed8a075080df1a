"""Text cut into pieces of token ids, as many as are wanted.

With ``corpus.pack`` short texts are joined: the texts of a split stand one after another, separated by the tokens that
begin a text, and are cut where the context is full. A token then attends to the texts before its own in the piece, as
in most models' training and in SAELens.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from saejax.errors import UserError
from saejax.models.tokens import bos_tokens, encode, make_chat_text, own_beginnings
from saejax.tasks.corpora import Document
from saejax.tasks.settings import CorpusConfig, TaskConfig
from saejax.tasks.text_sources import Messages, text_sources

SPLITS = ("train", "held_out")
_MAX_TEXTS, _MAX_CHARACTERS = 512, 2**22  # texts that are tokenized together; one alone may have more characters


class _Tokenized(NamedTuple):
    """A text and its token ids."""

    text: Document  #: the text
    ids: Sequence[int]  #: its token ids
    begins: bool  #: whether it begins with a special token of its own, and gets no BOS


class _Joined(NamedTuple):
    """Token ids of one text, or of several that stand in one piece."""

    first: Document  #: the text, or the first of them
    start: int  #: place of the first token in that text
    split: int  #: index in ``SPLITS``
    ids: Sequence[int]  #: token ids
    begins: bool = False  #: as of a text; packed texts all stand behind a BOS


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """A document of a store: its token ids and the columns of its row; the group by name."""

    ids_T: np.ndarray
    split: int
    group: str
    source: int
    start: int


def check_context(config: CorpusConfig, context: int) -> None:
    """Raise a ``UserError`` if pieces of text are longer than the longest input of the model, ``context`` tokens."""
    if config.context > context:
        raise UserError(f"--corpus.context={config.context} exceeds the model's context of {context} tokens: lower it")


class Chunker:
    """Splitter of texts into pieces, until there are as many tokens as are wanted.

    Args:
      config: settings for the number of tokens (per source where there are weights) and the length of pieces.
      tokenizer: the model's tokenizer.
      context: the longest input of the model, in tokens.
      task: see ``documents.make_documents``.
      bos: whether every piece begins with BOS, see ``tokens.encode``.

    Raises:
      UserError: pieces exceed the context or have no room for text; weights do not fit the sources; see ``bos_tokens``.
    """

    def __init__(
        self, config: CorpusConfig, tokenizer: Any, context: int, task: TaskConfig | None = None, bos: str = "auto"
    ):
        check_context(config, context)
        self._config, self._tokenizer = config, tokenizer
        self._bos, self._own = bos_tokens(tokenizer, bos), own_beginnings(tokenizer, bos)
        # What stands between two packed texts; a tokenizer may have neither.
        end = getattr(tokenizer, "eos_token_id", None)
        self._separator = self._bos or ([] if end is None else [end])
        if len(self._bos) >= config.context:
            raise UserError(
                f"--corpus.context={config.context} leaves no room after {len(self._bos)} special tokens: raise it"
            )
        self._budgets = _token_budgets(config, task)

    def has_enough(self, source: int) -> bool:
        """Return whether no more tokens of a source, given by its number, are wanted."""
        return self._budgets[self._budget_key(source)] <= 0

    def pieces(self, texts: Iterable[Document], held_out: Callable[[Document], bool]) -> Iterator[TextPiece]:
        """Yield the pieces of texts, in their order; ``held_out`` says which texts belong to that split.

        Raises:
          UserError: a source has less text than its weight asks for.
        """
        size = self._config.context - len(self._bos)  # every piece begins with its own BOS
        join = self._pack if self._config.pack else self._in_turn
        for text, first, split, ids, begins in join(self._tokenize_in_batches(texts), held_out, size):
            key = self._budget_key(text.source)
            for start in range(0, len(ids), size):
                if self._budgets[key] <= 0:
                    break
                front = [] if begins and not start else self._bos
                ids_T = np.array([*front, *ids[start : start + size]][: self._budgets[key]], np.int32)
                self._budgets[key] -= len(ids_T)
                yield TextPiece(ids_T, split, text.group, text.index, first + start)
            if not any(self._budgets.values()):
                return
        if self._config.weights and any(self._budgets.values()):
            short = ", ".join(f"source {key + 1} {count:,}" for key, count in self._budgets.items() if count)
            raise UserError(
                f"--corpus.weights asks for more tokens than there are: {short}; lower --corpus.max_tokens or those "
                "weights"
            )

    def _in_turn(
        self, texts: Iterable[_Tokenized], held_out: Callable[[Document], bool], size: int
    ) -> Iterator[_Joined]:
        """Yield each text by itself, with its split."""
        for text, ids, begins in texts:
            yield _Joined(text, 0, _split_of(text, held_out), ids, begins)

    def _pack(self, texts: Iterable[_Tokenized], held_out: Callable[[Document], bool], size: int) -> Iterator[_Joined]:
        """Yield the texts of each split and budget joined to pieces of ``size`` tokens.

        Every piece but the last of a split and budget is full. With pieces of five tokens and the separator s, the
        texts abc, de and fghij become abcsd, esfgh and ij. A piece that would begin with the separator begins after it.
        """
        separator = list(self._separator)
        waiting: dict[tuple[int, int], _Joined] = {}
        for text, ids, _ in texts:
            split = _split_of(text, held_out)
            before = waiting.pop((split, self._budget_key(text.source)), None)
            joined = [*before.ids, *separator, *ids] if before else list(ids)
            first, text_starts, start = before or _Joined(text, 0, split, ids), len(joined) - len(ids), 0
            while len(joined) - start >= size:
                yield _Joined(first.first, first.start, split, joined[start : start + size])
                start += size
                if start < text_starts:  # the cut fell before the separator's end
                    start = text_starts
                first = _Joined(text, start - text_starts, split, ())
            if start < len(joined):
                rest = _Joined(first.first, first.start, split, joined[start:])
                waiting[split, self._budget_key(text.source)] = rest
        yield from waiting.values()

    def check(self, splits: Collection[int]) -> None:
        """Raise a ``UserError`` unless the text's pieces are of all splits."""
        for index, name in enumerate(SPLITS):
            if index not in splits:
                raise UserError(
                    f"the {name} split has no text: the corpus has too few groups of documents, or "
                    f"--corpus.max_tokens={self._config.max_tokens} leaves too few"
                )

    def _budget_key(self, source: int) -> int:
        """Return the key of a source's budget: its number where sources are weighted, else 0."""
        return source if self._config.weights else 0

    def _tokenize_in_batches(self, texts: Iterable[Document]) -> Iterator[_Tokenized]:
        """Yield each text with its token ids; texts are tokenized many at a time."""
        batch, characters = list[Document](), 0
        # None after the last text, so that the last, partly filled batch is tokenized as well.
        for text in itertools.chain(texts, [None]):
            full = len(batch) == _MAX_TEXTS or characters > _MAX_CHARACTERS
            if batch and (full or text is None):
                yield from map(self._drop_bos, batch, self._tokenize(batch))
                batch, characters = [], 0
            if text is not None:
                batch.append(text)
                characters += text.size

    def _drop_bos(self, text: Document, ids: list[int]) -> _Tokenized:
        """Return a text without a BOS that it begins with itself: each of its pieces gets one."""
        size = len(self._bos)
        if ids[:size] == self._bos:
            return _Tokenized(text, ids[size:], False)
        return _Tokenized(text, ids, bool(ids) and ids[0] in self._own)

    def _tokenize(self, documents: Sequence[Document]) -> list[list[int]]:
        """Return the token ids of documents, without special tokens of the tokenizer's own.

        Token ids stay as they are, and chats get the special tokens of the chat template.
        """
        contents = [document.content for document in documents]
        texts = [self._text_of(content) for content in contents if not isinstance(content, np.ndarray)]
        # verbose=False: long texts are cut afterwards, so the tokenizer need not warn about them.
        try:
            of_texts = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        except Exception:  # of no type of its own
            for text in texts:
                encode(self._tokenizer, text, "never")  # which names the text that cannot be read
            raise
        remaining = iter(of_texts)
        return [content.tolist() if isinstance(content, np.ndarray) else next(remaining) for content in contents]

    def _text_of(self, content: str | Messages) -> str:
        """Return a document's text; raise a ``UserError`` for a chat if the tokenizer has no template for it."""
        if isinstance(content, str):
            return content
        advice = "name a model with a chat template that knows these roles, or text by --corpus.field"
        return make_chat_text(self._tokenizer, list(content), advice)


def _split_of(text: Document, held_out: Callable[[Document], bool]) -> int:
    """Return the split of a text, as an index in ``SPLITS``."""
    return SPLITS.index("held_out" if held_out(text) else "train")


def _token_budgets(config: CorpusConfig, task: TaskConfig | None) -> dict[int, int]:
    """Return the number of tokens to use of each source; without weights, of all together under 0."""
    if not config.weights:
        return {0: config.max_tokens or sys.maxsize}
    sources, total = len(text_sources(config, task or TaskConfig())), sum(config.weights)
    if len(config.weights) != sources or not config.max_tokens or not total:
        raise UserError(
            f"--corpus.weights={','.join(map(str, config.weights))}: expected a weight for each of {sources} sources, "
            "one above 0, and --corpus.max_tokens, of which they are shares"
        )
    return {source: round(config.max_tokens * weight / total) for source, weight in enumerate(config.weights)}

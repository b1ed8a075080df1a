"""Text cut into pieces of token ids, as many as are wanted."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.models.tokens import bos_tokens
from saejax.tasks.corpora import Document
from saejax.tasks.settings import CorpusConfig, TaskConfig
from saejax.tasks.text_sources import text_sources

SPLITS = ("train", "held_out")
_MAX_TEXTS, _MAX_CHARACTERS = 512, 2**22  # texts that are tokenized together; one alone may have more characters


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """A document of a store: its token ids and the columns of its row; the group by name."""

    ids_T: np.ndarray
    split: int
    group: str
    source: int
    start: int


class Chunker:
    """Splitter of texts into pieces, until there are as many tokens as are wanted.

    Args:
      config: settings for the number of tokens (per source where there are weights) and the length of pieces.
      tokenizer: the model's tokenizer.
      context: the longest input of the model, in tokens.
      task: see ``documents.make_documents``.
      bos: whether every piece begins with BOS, see ``bos_tokens``.

    Raises:
      UserError: pieces exceed the context or have no room for text; weights do not fit the sources; see ``bos_tokens``.
    """

    def __init__(
        self, config: CorpusConfig, tokenizer: Any, context: int, task: TaskConfig | None = None, bos: str = "auto"
    ):
        if config.context > context:
            raise UserError(
                f"--corpus.context={config.context} exceeds the model's context of {context} tokens: lower it"
            )
        self._config, self._tokenizer = config, tokenizer
        self._bos = bos_tokens(tokenizer, bos)
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
        for text, ids in self._tokenize_in_batches(texts):
            key = self._budget_key(text.source)
            for start in range(0, len(ids), size):
                if self._budgets[key] <= 0:
                    break
                ids_T = np.array([*self._bos, *ids[start : start + size]][: self._budgets[key]], np.int32)
                self._budgets[key] -= len(ids_T)
                side = SPLITS.index("held_out" if held_out(text) else "train")
                yield TextPiece(ids_T, side, text.group, text.index, start)
            if not any(self._budgets.values()):
                return
        if self._config.weights and any(self._budgets.values()):
            short = ", ".join(f"source {key + 1} {count:,}" for key, count in self._budgets.items() if count)
            raise UserError(
                f"--corpus.weights asks for more tokens than there are: {short}; lower --corpus.max_tokens or those "
                "weights"
            )

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

    def _tokenize_in_batches(self, texts: Iterable[Document]) -> Iterator[tuple[Document, Sequence[int]]]:
        """Yield each text with its token ids; texts are tokenized many at a time."""
        batch, characters = list[Document](), 0
        # None after the last text, so that the last, partly filled batch is tokenized as well.
        for text in itertools.chain(texts, [None]):
            full = len(batch) == _MAX_TEXTS or characters > _MAX_CHARACTERS
            if batch and (full or text is None):
                yield from zip(batch, self._tokenize([document.text for document in batch]), strict=True)
                batch, characters = [], 0
            if text is not None:
                batch.append(text)
                characters += len(text.text)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts without special tokens; a BOS that a text itself begins with is dropped."""
        # verbose=False: long texts are cut afterwards, so the tokenizer need not warn about them.
        sequences = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        size = len(self._bos)
        return [ids[size:] if size and ids[:size] == self._bos else ids for ids in sequences]


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

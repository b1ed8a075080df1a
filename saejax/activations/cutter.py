"""Text cut into pieces of token ids, as many as are wanted."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.models.tokens import bos_tokens
from saejax.settings import CorpusConfig, TaskConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.corpora import Document
from saejax.tasks.text_sources import text_sources

SPLITS = ("train", "held_out")
KINDS = ("corpus", "prompt")
_TOKENIZED_AT_ONCE, _CHARACTERS_AT_ONCE = 512, 2**22  # texts, of fewer characters unless one alone has more


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """What becomes a document of a store: its token ids, and the columns of its row; the group by name."""

    ids_T: np.ndarray
    split: int
    kind: int
    group: str
    source: int
    start: int


class Cutter:
    """Turns texts into pieces, until there are as many tokens as are wanted.

    Where the tokenizer puts a token in front of a text, every piece of the text begins with it.

    Args:
      config: the number of tokens, of each source where there are weights, and the length of pieces.
      tokenizer: of the model.
      context: the longest input of the model, in tokens.
      task: see ``make_documents``.

    Raises:
      UserError: pieces exceed the context, or have no room for text; weights that fit no sources.
    """

    def __init__(self, config: CorpusConfig, tokenizer: Any, context: int, task: TaskConfig | None):
        if config.context > context:
            raise UserError(
                f"--corpus.context={config.context} exceeds the model's context of {context} tokens: lower it"
            )
        self._config, self._tokenizer, self._context = config, tokenizer, context
        self._front = bos_tokens(tokenizer)
        if len(self._front) >= config.context:
            raise UserError(
                f"--corpus.context={config.context} leaves no room after {len(self._front)} special tokens: raise it"
            )
        self._left = _token_budgets(config, task)

    def enough(self, source: int) -> bool:
        """Whether no more tokens of a source, given by its number, are wanted."""
        return self._left[self._budget(source)] <= 0

    def pieces(self, texts: Iterable[Document], held_out: Callable[[Document], bool]) -> Iterator[TextPiece]:
        """The pieces of texts, one after the other.

        Raises:
          UserError: a source has less text than its weight asks for.
        """
        size = self._config.context - len(self._front)
        for text, plain in _tokenized(self._tokenizer, texts):
            own = self._budget(text.source)
            for start in range(0, len(plain), size):
                if self._left[own] <= 0:
                    break
                ids_T = np.array([*self._front, *plain[start : start + size]][: self._left[own]], np.int32)
                self._left[own] -= len(ids_T)
                side = SPLITS.index("held_out" if held_out(text) else "train")
                yield TextPiece(ids_T, side, KINDS.index("corpus"), text.group, text.index, start)
            if not any(self._left.values()):
                return
        if self._config.weights and any(self._left.values()):
            short = ", ".join(f"source {own + 1} {count:,}" for own, count in self._left.items() if count)
            raise UserError(
                f"--corpus.weights asks for more tokens than there are: {short}; lower --corpus.max_tokens or those "
                "weights"
            )

    def prompts(self, prompts: Mapping[int, Prompt]) -> Iterator[TextPiece]:
        """The pieces of prompts, by their index in their file; a ``UserError`` if one exceeds the context."""
        for index, prompt in prompts.items():
            ids_T = np.array([*self._front, *_tokenize(self._tokenizer, [prompt.text])[0]], np.int32)
            if len(ids_T) > self._context:
                raise UserError(
                    f"a prompt of {prompt.behaviour} has {len(ids_T)} tokens, more than the model's context of "
                    f"{self._context}: use another model, or leave that behaviour out of --task.behaviours"
                )
            train, kind = SPLITS.index("train"), KINDS.index("prompt")
            yield TextPiece(ids_T, train, kind, prompt_group(prompt), index, 0)

    def check(self, splits: Collection[int]) -> None:
        """A ``UserError`` unless the text's pieces are of all splits."""
        for index, name in enumerate(SPLITS):
            if index not in splits:
                raise UserError(
                    f"the {name} split has no text: the corpus has too few groups of documents, or "
                    f"--corpus.max_tokens={self._config.max_tokens} leaves too few"
                )

    def _budget(self, source: int) -> int:
        return source if self._config.weights else 0


def prompt_group(prompt: Prompt) -> str:
    """The group of a prompt's document."""
    return f"prompt/{prompt.behaviour}"


def _token_budgets(config: CorpusConfig, task: TaskConfig | None) -> dict[int, int]:
    """How many tokens are to be used of each source; without weights, of all together under 0."""
    if not config.weights:
        return {0: config.max_tokens or sys.maxsize}
    sources, total = len(text_sources(config, task or TaskConfig())), sum(config.weights)
    if len(config.weights) != sources or not config.max_tokens or not total:
        raise UserError(
            f"--corpus.weights={','.join(map(str, config.weights))}: expected a weight for each of {sources} sources, "
            "one above 0, and --corpus.max_tokens, of which they are shares"
        )
    return {source: round(config.max_tokens * weight / total) for source, weight in enumerate(config.weights)}


def _tokenized(tokenizer: Any, texts: Iterable[Document]) -> Iterator[tuple[Document, Sequence[int]]]:
    some, characters = list[Document](), 0
    for text in itertools.chain(texts, [None]):
        full = len(some) == _TOKENIZED_AT_ONCE or characters > _CHARACTERS_AT_ONCE
        if some and (full or text is None):
            yield from zip(some, _tokenize(tokenizer, [one.text for one in some]), strict=True)
            some, characters = [], 0
        if text is not None:
            some.append(text)
            characters += len(text.text)


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    # verbose=False: long texts are cut below, so the tokenizer need not warn of them.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

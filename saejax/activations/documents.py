"""The documents of a store: text as the model reads it, cut into pieces, each wholly in one split.

What a store calls a *document* is one piece that goes through the model: at most ``corpus.context`` tokens of
a text of the corpus, or a behaviour's train prompt. Documents stand in a seeded random order, so that any
number of them from the front is a fair sample.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.settings import CorpusConfig, TaskConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.corpora import Document, read_corpus, split

SPLITS = ("train", "held_out")
KINDS = ("corpus", "prompt")
COLUMNS = ("split", "kind", "group", "source", "start")
_TOKENIZED_AT_ONCE = 512
_SELECTION, _ORDER = 1, 2  # streams of random numbers drawn from one seed, apart from those that split the groups


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents and where they come from; ``documents[i]`` is the token ids, int32, of document i.

    Attributes:
      ids_T: token ids of all documents, one after the other, int32.
      offsets: where each begins in ``ids_T``, and the end of the last; int64 [N + 1].
      table_Nx5: int32 columns: split (index in ``SPLITS``), kind (in ``KINDS``), group (in ``groups``), source (index
        of the text in the corpus, or of the prompt in the baseline's file), start (the piece's first token, counted
        in the source).
      groups: names of the groups; that of a prompt is "prompt/" and its behaviour.
    """

    ids_T: np.ndarray
    offsets: np.ndarray
    table_Nx5: np.ndarray
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.table_Nx5)

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document}: there are {len(self)}")
        return self.ids_T[self.offsets[document] : self.offsets[document + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[document] for document in range(len(self)))

    @property
    def lengths_N(self) -> np.ndarray:
        """Number of tokens of each document."""
        return np.diff(self.offsets)

    @property
    def split_N(self) -> np.ndarray:
        """Split of each document, as an index in ``SPLITS``."""
        return self.column("split")

    def column(self, name: str) -> np.ndarray:
        """A column of the table."""
        return self.table_Nx5[:, COLUMNS.index(name)]

    def of(self, split: str) -> list[np.ndarray]:
        """Token ids of every document of a split ("train" or "held_out"), in random order."""
        return [self[int(document)] for document in np.flatnonzero(self.split_N == SPLITS.index(split))]

    def place(self, document: int, position: int) -> str:
        """In words, where a position of a document stands in what the user gave."""
        _, kind, group, source, start = self.table_Nx5[document].tolist()
        if KINDS[kind] == "prompt":
            return f"{self.groups[group]} (line {source + 1} of prompts.jsonl), position {position}"
        return f"document {source} of the corpus, position {start + position}"

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored, by file name; ``groups`` go into the manifest."""
        return {"ids.npy": self.ids_T, "offsets.npy": self.offsets, "table.npy": self.table_Nx5}

    @classmethod
    def read(cls, folder: Path, groups: Sequence[str]) -> "Documents":
        """The documents whose ``arrays`` were written to a folder. The ids stay on disk until they are used."""
        ids_T = np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False)
        offsets, table_Nx5 = (np.load(folder / name, allow_pickle=False) for name in ("offsets.npy", "table.npy"))
        return cls(ids_T, offsets, table_Nx5, tuple(groups))


@dataclasses.dataclass(frozen=True)
class _Piece:
    ids_T: np.ndarray
    split: int
    kind: int
    group: str
    source: int
    start: int


def make_documents(
    config: CorpusConfig, prompts: Mapping[int, Prompt], tokenizer: Any, context: int, task: TaskConfig | None = None
) -> Documents:
    """Reads the corpus and cuts it into documents; prompts join the train split, whole.

    Where the tokenizer puts a token in front of a text, every piece of the text begins with it.

    Args:
      config: the corpus, its split, the number of tokens and the length of pieces.
      prompts: the prompts, by their index in their file.
      tokenizer: of the model.
      context: the longest input of the model, in tokens.
      task: which questions of benchmarks are asked, and so are no text.

    Raises:
      UserError: the corpus is empty or unreadable, a split would be, a source has less text than its weight asks for,
        or a piece or prompt exceeds the context.
    """
    if config.context > context:
        raise UserError(f"--corpus.context={config.context} exceeds the model's context of {context} tokens: lower it")
    front = front_tokens(tokenizer)
    if len(front) >= config.context:
        raise UserError(f"--corpus.context={config.context} leaves no room after {len(front)} special tokens: raise it")
    pieces = _corpus_pieces(config, task, tokenizer, front)
    for split_index, name in enumerate(SPLITS):
        if not any(piece.split == split_index for piece in pieces):
            raise UserError(
                f"the {name} split has no text: the corpus has too few groups of documents, or "
                f"--corpus.max_tokens={config.max_tokens} leaves too few"
            )
    for index, prompt in prompts.items():
        ids_T = np.array([*front, *_tokenize(tokenizer, [prompt.text])[0]], np.int32)
        if len(ids_T) > context:
            raise UserError(
                f"a prompt of {prompt.behaviour} has {len(ids_T)} tokens, more than the model's context of {context}: "
                "use another model, or leave that behaviour out of --task.behaviours"
            )
        train, kind = SPLITS.index("train"), KINDS.index("prompt")
        pieces.append(_Piece(ids_T, train, kind, f"prompt/{prompt.behaviour}", index, 0))
    order = np.random.default_rng([config.seed, _ORDER]).permutation(len(pieces))
    return _assemble([pieces[i] for i in order])


def _corpus_pieces(config: CorpusConfig, task: TaskConfig | None, tokenizer: Any, front: Sequence[int]) -> list[_Piece]:
    texts = read_corpus(config, task)
    held_out = {document.index for document in split(texts, config.held_out, config.seed)[1]}
    order = np.random.default_rng([config.seed, _SELECTION]).permutation(len(texts))
    left, pieces = _token_budgets(config, texts), list[_Piece]()
    size = config.context - len(front)
    for text, plain in _tokenized(tokenizer, [texts[i] for i in order]):
        own = text.source if config.weights else 0
        for start in range(0, len(plain), size):
            if left[own] <= 0:
                break
            ids_T = np.array([*front, *plain[start : start + size]][: left[own]], np.int32)
            left[own] -= len(ids_T)
            side = SPLITS.index("held_out" if text.index in held_out else "train")
            pieces.append(_Piece(ids_T, side, KINDS.index("corpus"), text.group, text.index, start))
        if not any(left.values()):
            break
    if config.weights and any(left.values()):
        short = ", ".join(f"source {own + 1} {count:,}" for own, count in left.items() if count)
        raise UserError(
            f"--corpus.weights asks for more tokens than there are: {short}; lower --corpus.max_tokens or those weights"
        )
    return pieces


def _token_budgets(config: CorpusConfig, texts: Sequence[Document]) -> dict[int, int]:
    """How many tokens are to be used of each source; without weights, of all together under 0."""
    if not config.weights:
        return {0: config.max_tokens or sys.maxsize}
    sources, total = texts[-1].source + 1, sum(config.weights)
    if len(config.weights) != sources or not config.max_tokens or not total:
        raise UserError(
            f"--corpus.weights={','.join(map(str, config.weights))}: expected a weight for each of {sources} sources, "
            "one above 0, and --corpus.max_tokens, of which they are shares"
        )
    return {source: round(config.max_tokens * weight / total) for source, weight in enumerate(config.weights)}


def _tokenized(tokenizer: Any, texts: Sequence[Document]) -> Iterator[tuple[Document, Sequence[int]]]:
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        some = texts[start : start + _TOKENIZED_AT_ONCE]
        yield from zip(some, _tokenize(tokenizer, [text.text for text in some]), strict=True)


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    # verbose=False: long texts are cut below, so the tokenizer need not warn of them.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def front_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    marked, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return next(marked[:i] for i in range(len(marked) - len(plain), -1, -1) if marked[i : i + len(plain)] == plain)


def _assemble(pieces: Sequence[_Piece]) -> Documents:
    groups = tuple(sorted({piece.group for piece in pieces}))
    index = {group: i for i, group in enumerate(groups)}
    table = [(piece.split, piece.kind, index[piece.group], piece.source, piece.start) for piece in pieces]
    offsets = np.concatenate([[0], np.cumsum([len(piece.ids_T) for piece in pieces])]).astype(np.int64)
    return Documents(
        np.concatenate([piece.ids_T for piece in pieces]),
        offsets,
        np.array(table, np.int32).reshape(-1, len(COLUMNS)),
        groups,
    )

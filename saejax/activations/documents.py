"""The documents of a store: pieces of text as token ids, each wholly in one split.

A *document* is what goes through the model at a time: at most ``corpus.context`` tokens of a text of the corpus.
Documents of the train split come first, then the held-out ones, each split in a seeded random order:
any number of documents from the front of a split is a fair sample of it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from saejax.activations.chunker import SPLITS, Chunker, TextPiece
from saejax.tasks.corpora import read_corpus, split
from saejax.tasks.settings import CorpusConfig, TaskConfig
from saejax.wording import counted

COLUMNS = ("split", "group", "source", "start")
FILES = ("ids.npy", "starts.npy", "lengths.npy", "table.npy")
_SELECTION, _ORDER = 1, 2  # streams of random numbers drawn from one seed, apart from the streams that split the groups


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents and where they come from; ``documents[i]`` is the token ids, int32, of document i."""

    #: int32 token ids of all documents. In a store they follow the order of the documents, in the output of the stage
    #: ``tokenize`` that of the text.
    ids_T: np.ndarray
    starts_N: np.ndarray  #: int64, index in ``ids_T`` of each document's first token
    lengths_N: np.ndarray  #: int32, number of tokens of each document
    #: int32 columns: split (index in ``SPLITS``), group (in ``groups``), source (index of the text in the corpus),
    #: start (the piece's first token, counted in the source).
    table_Nx4: np.ndarray
    groups: tuple[str, ...]  #: names of the groups; groups of streamed text have numbers only

    @classmethod
    def contiguous(
        cls, ids_T: np.ndarray, lengths: Sequence[int] | np.ndarray, table_Nx4: np.ndarray, groups: Sequence[str]
    ) -> Self:
        """Return documents of these lengths, whose token ids follow one another in ``ids``, and rows of the table."""
        lengths_N = np.asarray(lengths, np.int32)
        starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
        return cls(ids_T, starts_N, lengths_N, table_Nx4, tuple(groups))

    def __len__(self) -> int:
        return len(self.starts_N)

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document}: there are {len(self)}")
        start = self.starts_N[document]
        return self.ids_T[start : start + self.lengths_N[document]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[document] for document in range(len(self)))

    @property
    def split_N(self) -> np.ndarray:
        """Split of each document, as an index in ``SPLITS``; ascending."""
        return self.column("split")

    @property
    def train_count(self) -> int:
        """Number of documents of the train split, which are the first ones."""
        return int(np.searchsorted(self.split_N, SPLITS.index("train"), side="right"))

    def describe(self, packed: bool = False) -> str:
        """Return how many documents of the corpus these are: "200 documents in 264 pieces of at most 256 tokens".

        Of packed ones the number of pieces alone is known.
        """
        pieces = f"{counted(len(self), 'piece')} of at most {self.lengths_N.max(initial=0):,} tokens"
        if packed:
            return f"{pieces}, packed with texts"
        texts = len(np.unique(self.column("source")))
        if texts == len(self):
            return counted(texts, "document")
        return f"{counted(texts, 'document')} in {pieces}"

    def column(self, name: str) -> np.ndarray:
        """Return a column of the table."""
        return self.table_Nx4[:, COLUMNS.index(name)]

    def of(self, split: str) -> list[np.ndarray]:
        """Return the token ids of every document of a split ("train" or "held_out"), in random order."""
        return [self[document] for document in range(*self._bounds(split))]

    def training(self) -> "Documents":
        """Return the documents of the train split, without a copy."""
        count = self.train_count
        return dataclasses.replace(
            self, starts_N=self.starts_N[:count], lengths_N=self.lengths_N[:count], table_Nx4=self.table_Nx4[:count]
        )

    def sample(self, tokens: int) -> "Documents":
        """Return a copy of the first documents of each split until this many tokens."""
        chosen = []
        for name in SPLITS:
            first, stop = self._bounds(name)
            ends = np.cumsum(self.lengths_N[first:stop], dtype=np.int64)
            chosen.append(np.arange(first, min(first + int(np.searchsorted(ends, tokens)) + 1, stop)))
        return self.select(np.concatenate(chosen))

    def select(self, chosen_N: np.ndarray) -> "Documents":
        """Return a copy of some documents, by their indices, ascending."""
        ids_T = np.concatenate([self[int(document)] for document in chosen_N])
        return Documents.contiguous(ids_T, self.lengths_N[chosen_N], self.table_Nx4[chosen_N], self.groups)

    def place(self, document: int, position: int) -> str:
        """Describe where a position of a document stands in what the user gave."""
        _, _, source, start = self.table_Nx4[document].tolist()
        return f"document {source} of the corpus, position {start + position}"

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by file name."""
        return dict(zip(FILES, (self.ids_T, self.starts_N, self.lengths_N, self.table_Nx4), strict=True))

    @classmethod
    def read(cls, folder: Path, groups: Sequence[str] = ()) -> Self:
        """Return the documents whose ``arrays`` a folder holds. They stay on disk until they are used."""
        # Plain arrays on the maps: slices of a memmap take ten times as long.
        ids_T, starts_N, lengths_N, table_Nx4 = (
            np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False)) for name in FILES
        )
        return cls(ids_T, starts_N, lengths_N, table_Nx4, tuple(groups))

    def _bounds(self, split: str) -> tuple[int, int]:
        """Return the first document of a split and the one after its last."""
        return (0, self.train_count) if split == "train" else (self.train_count, len(self))


def shuffled_order(split_N: np.ndarray, seed: int) -> np.ndarray:
    """Return the indices of pieces in the order of documents: train before held-out, random within each split.

    Args:
      split_N: split of each piece.
      seed: seed of the order.
    """
    order_N = np.random.default_rng([seed, _ORDER]).permutation(len(split_N))
    return order_N[np.argsort(split_N[order_N], kind="stable")]


def make_documents(
    config: CorpusConfig, tokenizer: Any, context: int, task: TaskConfig | None = None, bos: str = "auto"
) -> Documents:
    """Read the corpus and cut it into documents.

    Args:
      config: the corpus, its split, the number of tokens and the length of pieces.
      tokenizer: the model's tokenizer.
      context: the longest input of the model, in tokens.
      task: settings that name the benchmark questions, which are left out of the text.
      bos: "auto", "always" or "never", see ``bos_tokens``.

    Raises:
      UserError: the corpus is empty or unreadable, a split would be, a source has less text than its weight asks for,
        or a piece exceeds the context.
    """
    chunker, texts = Chunker(config, tokenizer, context, task, bos), read_corpus(config, task)
    held_out = {document.index for document in split(texts, config.held_out, config.seed)[1]}
    # In random order, so that a limit of tokens takes a sample of the corpus and not its beginning.
    order = np.random.default_rng([config.seed, _SELECTION]).permutation(len(texts))
    pieces = list(chunker.pieces((texts[i] for i in order), lambda document: document.index in held_out))
    # Before the prompts join: they are of the train split and would hide that it has no text.
    chunker.check([piece.split for piece in pieces])
    order = shuffled_order(np.array([piece.split for piece in pieces]), config.seed)
    return _assemble([pieces[i] for i in order])


def _assemble(pieces: Sequence[TextPiece]) -> Documents:
    """Return documents of these pieces, in this order."""
    groups = tuple(sorted({piece.group for piece in pieces}))
    index = {group: i for i, group in enumerate(groups)}
    table = [(piece.split, index[piece.group], piece.source, piece.start) for piece in pieces]
    return Documents.contiguous(
        np.concatenate([piece.ids_T for piece in pieces]),
        np.array([len(piece.ids_T) for piece in pieces]),
        np.array(table, np.int32).reshape(-1, len(COLUMNS)),
        groups,
    )

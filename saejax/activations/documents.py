"""The documents of a store: text as the model reads it, cut into pieces, each wholly in one split.

What a store calls a *document* is one piece that goes through the model: at most ``corpus.context`` tokens of
a text of the corpus, or a behaviour's train prompt. Documents stand in a seeded random order, so that any
number of them from the front is a fair sample; those of a stream (``tokenize``) split by split.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.activations.cutter import KINDS, SPLITS, Cutter, TextPiece
from saejax.settings import CorpusConfig, TaskConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.corpora import read_corpus, split

COLUMNS = ("split", "kind", "group", "source", "start")
FILES = ("ids.npy", "offsets.npy", "table.npy")
_BLOCK = 2**16  # documents that are looked at together
_SELECTION, ORDER = 1, 2  # streams of random numbers drawn from one seed, apart from those that split the groups


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents and where they come from; ``documents[i]`` is the token ids, int32, of document i.

    Attributes:
      ids_T: token ids of all documents, one after the other, int32.
      offsets: where each begins in ``ids_T``, and the end of the last; int64 [N + 1].
      table_Nx5: int32 columns: split (index in ``SPLITS``), kind (in ``KINDS``), group (in ``groups``), source (index
        of the text in the corpus, or of the prompt in the baseline's file), start (the piece's first token, counted
        in the source).
      groups: names of the groups; that of a prompt is "prompt/" and its behaviour. Groups of a stream's text have no
        names, only numbers above these.
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

    def length_counts(self) -> np.ndarray:
        """How many documents have each length, from 0 to the longest; in little memory, whatever their number."""
        counts = np.zeros(1, np.int64)
        for start in range(0, len(self), _BLOCK):
            own = np.bincount(np.diff(self.offsets[start : start + _BLOCK + 1]), minlength=len(counts))
            own[: len(counts)] += counts
            counts = own
        return counts

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

    def sample(self, tokens: int) -> "Documents":
        """The first documents of each split until this many tokens, in their order and in memory."""
        kept = [own for split in range(len(SPLITS)) for own in self._first(split, tokens)]
        return self._only(np.sort(np.concatenate(kept)))

    def _first(self, split: int, tokens: int) -> Iterator[np.ndarray]:
        """Documents of a split until this many tokens; looked for in blocks, as there may be many millions."""
        for start in range(0, len(self), _BLOCK):
            own = start + np.flatnonzero(self.split_N[start : start + _BLOCK] == split)
            ends = np.cumsum(self.offsets[own + 1] - self.offsets[own])
            own = own[: np.searchsorted(ends, tokens) + 1]
            yield own
            if len(own) and (tokens := tokens - int(ends[len(own) - 1])) <= 0:
                return

    def training(self) -> "Documents":
        """The documents of the train split, in their order; no copy where they stand in front."""
        train_N = self.split_N == SPLITS.index("train")
        count = int(train_N.sum())
        if count and train_N[:count].all():
            return Documents(self.ids_T, self.offsets[: count + 1], self.table_Nx5[:count], self.groups)
        return self._only(np.flatnonzero(train_N))

    def _only(self, kept_N: np.ndarray) -> "Documents":
        ids = [self[int(document)] for document in kept_N]
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
        return Documents(np.concatenate(ids), offsets, self.table_Nx5[kept_N], self.groups)

    def place(self, document: int, position: int) -> str:
        """In words, where a position of a document stands in what the user gave."""
        _, kind, group, source, start = self.table_Nx5[document].tolist()
        if KINDS[kind] == "prompt":
            return f"{self.groups[group]} (line {source + 1} of prompts.jsonl), position {position}"
        return f"document {source} of the corpus, position {start + position}"

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored, by file name; ``groups`` go into the manifest."""
        return dict(zip(FILES, (self.ids_T, self.offsets, self.table_Nx5), strict=True))

    @classmethod
    def read(cls, folder: Path, groups: Sequence[str]) -> "Documents":
        """The documents whose ``arrays`` were written to a folder. They stay on disk until they are used."""
        ids_T, offsets, table_Nx5 = (
            # Plain arrays on the maps: slices of a memmap take ten times as long.
            np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False))
            for name in FILES
        )
        return cls(ids_T, offsets, table_Nx5, tuple(groups))


def make_documents(
    config: CorpusConfig, prompts: Mapping[int, Prompt], tokenizer: Any, context: int, task: TaskConfig | None = None
) -> Documents:
    """Reads the corpus and cuts it into documents; prompts join the train split, whole.

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
    cutter, texts = Cutter(config, tokenizer, context, task), read_corpus(config, task)
    held_out = {document.index for document in split(texts, config.held_out, config.seed)[1]}
    order = np.random.default_rng([config.seed, _SELECTION]).permutation(len(texts))
    pieces = list(cutter.pieces((texts[i] for i in order), lambda document: document.index in held_out))
    cutter.check([piece.split for piece in pieces])
    pieces += cutter.prompts(prompts)
    order = np.random.default_rng([config.seed, ORDER]).permutation(len(pieces))
    return _assemble([pieces[i] for i in order])


def _assemble(pieces: Sequence[TextPiece]) -> Documents:
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

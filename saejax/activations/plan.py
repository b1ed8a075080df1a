"""The plan of a capture: the rows of each shard, and the batches in which its documents go through the model.

Rows follow the documents' random order, train before held-out, and are cut into shards of ``shard_rows``. A shard's
batches hold only its own rows, so that it comes out the same whether or not the shards before it were made in the same
process. A document that is cut between two shards is read for both. Batches have few shapes, and as many rows as the
devices over which they are split divide: of a shard of 65,536 tokens at most a few rows hold no document.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from saejax.activations.documents import Documents
from saejax.models.lengths import bucket_lengths, part_batches
from saejax.models.sites import AnySite

_PERMUTATION = 3  # stream of random numbers, apart from the documents' streams
_PROGRAM = 4096  # tokens that run in the time in which a program of another shape is compiled, roughly


@dataclasses.dataclass(frozen=True)
class Batch:
    """Documents that go through the model together."""

    ids_BxT: np.ndarray  #: int32 token ids, padded on the right with 0
    documents_B: np.ndarray  #: index of each in the store
    #: first_B and stop_B: the recorded positions of each are first to stop - 1; its tokens here are 0 to stop - 1.
    first_B: np.ndarray
    stop_B: np.ndarray
    #: for each, the rows of the shard, [stop - first], that its recorded positions become.
    rows_B: tuple[np.ndarray, ...]
    train_B: np.ndarray  #: bool: whether each is of the train split
    #: rows and length to which a program of fixed shape fills the batch up, at least as many as in ``ids_BxT``.
    shape: tuple[int, int]

    @property
    def mask_BxT(self) -> np.ndarray:
        """1 at real tokens, 0 at padding; int64."""
        return (np.arange(self.ids_BxT.shape[1])[None, :] < self.stop_B[:, None]).astype(np.int64)

    @property
    def rows(self) -> int:
        """Number of recorded tokens."""
        return len(self.row_N)

    @functools.cached_property
    def row_N(self) -> np.ndarray:
        """The row of the shard of every recorded token, document by document."""
        return np.concatenate(self.rows_B)

    @functools.cached_property
    def places_N(self) -> tuple[np.ndarray, np.ndarray]:
        """Document of the batch and position of every recorded token."""
        counts_B = self.stop_B - self.first_B
        ends_B = np.cumsum(counts_B)
        position_N = np.arange(ends_B[-1]) + np.repeat(self.stop_B - ends_B, counts_B)
        return np.repeat(np.arange(len(counts_B)), counts_B), position_N


@dataclasses.dataclass(frozen=True)
class CapturedValues:
    """The vectors of a batch at a site, with norms and sums computed where the model ran."""

    #: vectors as they are stored, float32 or bfloat16 [B, T, D], cut along B into a piece of each device; B and T may
    #: be larger than the batch's.
    pieces: Sequence[np.ndarray]
    norms_BxT: np.ndarray  #: float32 Euclidean norms of the stored vectors; NaN or infinite where a value is
    #: float32 or float64 sums over each document's recorded tokens; 0 of one that is not of the train split.
    train_sum_BxD: np.ndarray


Take = Callable[[Batch, AnySite, CapturedValues], object]


class Reader(Protocol):
    """A backend of capture."""

    widths: dict[AnySite, int]  #: width of the values at every site

    def read(self, batches: Iterable[Batch], take: Take) -> None:
        """Run the batches, in their order, up to the last of the wanted sites.

        This calls ``take(batch, site, values)`` once for every batch and site, batches in order. The values are never
        changed, so that ``take`` may keep them.
        """

    def close(self) -> None:
        """Give back the devices' memory."""


class Plan:
    """The shards and batches of a capture.

    Args:
      documents: documents, in the order in which they are captured.
      shard_rows: rows per shard; the last shard has the remainder.
      batch_tokens: most tokens of a batch on each device, padding included; a longer document is alone on its device.
      last: record only the last n positions of every text; 0: all.
      seed: seed of the order of rows within a shard.
      whole: all documents, where only some of them are captured; says where texts end.
      devices: devices over which the rows of a batch are split.

    Raises:
      ValueError: a document of the train split follows one that is held out.
    """

    def __init__(
        self,
        documents: Documents,
        shard_rows: int,
        batch_tokens: int,
        last: int,
        seed: int,
        whole: Documents | None = None,
        devices: int = 1,
    ):
        self.documents, self.shard_rows, self.seed = documents, shard_rows, seed
        self._batch_tokens, self._devices = batch_tokens * devices, devices
        if (np.diff(documents.split_N) < 0).any():
            raise ValueError("documents of the train split come first")
        self._first_N = _first_recorded(documents, last, documents if whole is None else whole)
        self._ends_N = np.cumsum(documents.lengths_N - self._first_N, dtype=np.int64)

    @property
    def rows(self) -> int:
        """Number of rows of the store."""
        return int(self._ends_N[-1])

    @property
    def train_rows(self) -> int:
        """Number of rows of the train split, which are the first ones."""
        count = self.documents.train_count
        return int(self._ends_N[count - 1]) if count else 0

    @property
    def tokens(self) -> dict[str, int]:
        """Number of rows of each split."""
        return dict(train=self.train_rows, held_out=self.rows - self.train_rows)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def size(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def train_size(self, shard: int) -> int:
        """Return the number of rows of a shard that are of the train split: its first ones."""
        return int(np.clip(self.train_rows - shard * self.shard_rows, 0, self.size(shard)))

    def index(self, shard: int) -> np.ndarray:
        """Return document, position and token id of every row of a shard; int32 [rows, 3]."""
        index_Rx3 = np.empty((self.size(shard), 3), np.int32)
        spans = self._spans(shard)
        for document, first, stop, rows in zip(*spans, self._rows(shard, spans), strict=True):
            index_Rx3[rows, 0] = document
            index_Rx3[rows, 1] = np.arange(first, stop)
            index_Rx3[rows, 2] = self.documents[document][first:stop]
        return index_Rx3

    def batches(self, shard: int) -> list[Batch]:
        """Return the batches of a shard, longest documents first: what does not fit into memory fails at once."""
        documents_S, first_S, stop_S = spans = self._spans(shard)
        rows = self._rows(shard, spans)
        batches = []
        # Spans of similar length go through the model together.
        for chosen, filled, length in part_batches(stop_S, self._lengths, self._batch_tokens, self._devices, _PROGRAM):
            ids_BxT = np.zeros((len(chosen), stop_S[chosen[0]]), np.int32)
            for row, document, stop in zip(ids_BxT, documents_S[chosen], stop_S[chosen], strict=True):
                row[:stop] = self.documents[document][:stop]
            taken = tuple(rows[i] for i in chosen)
            train_B = documents_S[chosen] < self.documents.train_count
            where = documents_S[chosen], first_S[chosen], stop_S[chosen]
            batches.append(Batch(ids_BxT, *where, taken, train_B, (filled, length)))
        return batches

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """The lengths of programs, rising; the last is the longest document's."""
        return bucket_lengths(np.bincount(self.documents.lengths_N), _PROGRAM)

    def _spans(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a shard's documents, in order, with the first and one past the last recorded position of each."""
        start, stop = shard * self.shard_rows, shard * self.shard_rows + self.size(shard)
        from_document, to_document = np.searchsorted(self._ends_N, [start, stop - 1], side="right")
        within = np.arange(from_document, to_document + 1)
        recorded = self.documents.lengths_N[within] - self._first_N[within]
        documents_S, recorded_S = within[recorded > 0], recorded[recorded > 0]
        begin_S = self._ends_N[documents_S] - recorded_S  # each document's first row in the store
        first_S, stop_S = np.maximum(begin_S, start), np.minimum(self._ends_N[documents_S], stop)
        shift_S = self._first_N[documents_S] - begin_S
        return documents_S, first_S + shift_S, stop_S + shift_S

    def _rows(self, shard: int, spans: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[np.ndarray]:
        """Return the rows of the shard that each span becomes: a random permutation of each split, cut up."""
        # A stream of random numbers for each shard, so that it comes out the same without the others.
        rng, train = np.random.default_rng([self.seed, _PERMUTATION, shard]), self.train_size(shard)
        order_R = np.concatenate([rng.permutation(train), train + rng.permutation(self.size(shard) - train)])
        return np.split(order_R, np.cumsum(spans[2] - spans[1])[:-1])


def _first_recorded(documents: Documents, last: int, whole: Documents) -> np.ndarray:
    """Return the first recorded position of each document, its length where none is.

    The last positions are counted from the end of the text that a document is a piece of, so that they may lie in
    its last pieces only.
    """
    if not last:
        return np.broadcast_to(np.int64(0), len(documents))
    ends = np.zeros(int(whole.column("source").max()) + 1, np.int64)  # of each text, where its last piece ends
    np.maximum.at(ends, whole.column("source"), whole.column("start") + whole.lengths_N)
    return np.clip(ends[documents.column("source")] - last - documents.column("start"), 0, documents.lengths_N)

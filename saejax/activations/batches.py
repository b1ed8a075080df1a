"""Training batches from a store: which rows make a batch is a pure function of the seed, the epoch and a window.

1. Epoch e takes the shards in a random order, ``default_rng([seed, e])``.
2. Shards that follow one another make a *window*, about ``window_rows`` rows. The rows of window w are permuted by
   ``default_rng([seed, e, 1 + w])``. (Rows of a shard are already in random order, and of documents in random order.)
3. The windows' rows, one after the other, are cut into batches. Rows that do not fill the epoch's last batch are left
   out. Within a batch rows ascend, so that they are read in the order in which they lie on disk.

Attention sinks differ from site to site, so each column of a batch, an input with its target, has an order of its own:
what other columns there are changes nothing in it. All have as many batches as the split has rows for, sinks included.
The first rows of one more epoch make up for a column's sinks.

So batch n can be computed from its number, a run that resumes at step n needs no other state, and the first batch reads
one window only. The order depends neither on the number of processes nor on where the rows are read from.
"""

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

Parts = Sequence[Sequence[str]]
# Two threads keep two reads going, which hides the disk; more would take the processor from the training step.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class RowRange:
    """The usable rows of a split: a range with some rows excluded."""

    #: first and stop: rows first to stop - 1.
    first: int
    stop: int
    excluded: np.ndarray  #: int64, ascending, the rows among these that are left out
    shard_rows: int  #: rows of a shard; row r is in shard r // shard_rows

    def __len__(self) -> int:
        return self.stop - self.first - len(self.excluded)

    @property
    def shards(self) -> range:
        """Shards that hold the rows."""
        return range(self.first // self.shard_rows, -(-self.stop // self.shard_rows))

    def rows(self) -> np.ndarray:
        """Return all usable rows, int64, ascending; 8 bytes a row."""
        return self._between(self.first, self.stop)

    def of_shard(self, shard: int) -> np.ndarray:
        """Return the usable rows of a shard, int64, ascending."""
        start = shard * self.shard_rows
        return self._between(max(self.first, start), min(self.stop, start + self.shard_rows))

    def shard_counts(self) -> np.ndarray:
        """Return the number of usable rows in each of ``shards``."""
        ends = np.clip(np.array([*self.shards, self.shards.stop]) * self.shard_rows, self.first, self.stop)
        return np.diff(ends) - np.diff(np.searchsorted(self.excluded, ends))

    def rank(self, rows_N: np.ndarray) -> np.ndarray:
        """Return the indices of rows among all usable ones."""
        return rows_N - self.first - np.searchsorted(self.excluded, rows_N)

    def _between(self, first: int, stop: int) -> np.ndarray:
        """Return the usable rows from ``first`` to ``stop - 1``."""
        excluded = self.excluded[slice(*np.searchsorted(self.excluded, [first, stop]))]
        return np.delete(np.arange(first, stop, dtype=np.int64), excluded - first)


class BatchOrder:
    """The order of batches of a column; see the module docstring.

    Args:
      usable: the rows that make up an epoch.
      batch: number of rows per batch.
      seed: seed of the order.
      epochs: passes over the rows, each in another order.
      window_rows: rows that are shuffled together; at least one shard is.
    """

    def __init__(self, usable: RowRange, batch: int, seed: int, epochs: int, window_rows: int):
        self._usable, self._batch, self._seed = usable, batch, seed
        self._window_shards = max(1, window_rows // usable.shard_rows)
        self._counts = usable.shard_counts()
        self.per_epoch = len(usable) // batch
        self._length = (usable.stop - usable.first) // batch * epochs if self.per_epoch else 0
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of batches of a run; 0 if there are fewer rows than one batch has."""
        return self._length

    def rows(self, step: int) -> np.ndarray:
        """Return the rows [batch], ascending, of batch ``step``, from 0."""
        epoch, index = divmod(step, self.per_epoch)
        start, stop = index * self._batch, (index + 1) * self._batch
        with self._lock:  # threads that read ahead would each permute the next window
            _, ends = self._epoch(epoch)
            parts = []
            for window in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
                begin = ends[window - 1] if window else 0
                parts.append(self._window(epoch, window)[max(start - begin, 0) : stop - begin])
                if stop <= ends[window]:
                    break
        return np.sort(np.concatenate(parts))

    def ranks(self, step: int) -> np.ndarray:
        """Return the same rows as indices among all usable ones."""
        return self._usable.rank(self.rows(step))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of shards, as indices in ``usable.shards``, and the last row, exclusive, of each window."""
        if epoch not in self._epochs:
            order_S = np.random.default_rng([self._seed, epoch]).permutation(len(self._counts))
            ends = np.cumsum(self._counts[order_S])
            # The last window may have fewer shards than the others.
            last = np.arange(self._window_shards, len(ends) + self._window_shards, self._window_shards) - 1
            # Batches are asked for in order; a thread that reads ahead may still need the epoch before.
            self._epochs = {e: value for e, value in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = order_S, ends[np.minimum(last, len(ends) - 1)]
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Return the rows of a window in their order; the two that were used last are kept."""
        key = epoch, window
        if key not in self._windows:
            order_S, _ = self._epoch(epoch)
            first = window * self._window_shards
            shards = np.sort(order_S[first : first + self._window_shards]) + self._usable.shards.start
            rows_R = np.concatenate([self._usable.of_shard(int(shard)) for shard in shards])
            # A batch may take rows of two windows that follow one another.
            if len(self._windows) > 1:
                del self._windows[next(iter(self._windows))]
            self._windows[key] = np.random.default_rng([self._seed, epoch, 1 + window]).permutation(rows_R)
        return self._windows[key]


class _Batches:
    """Random access to the batches of all epochs; a Grain data source."""

    def __init__(self, rows: Any, parts: Parts, orders: Sequence[BatchOrder], slice_of_batch: slice):
        self._rows, self._parts, self._orders, self._slice = rows, parts, orders, slice_of_batch

    def __len__(self) -> int:
        return min(map(len, self._orders))

    def __getitem__(self, step: int) -> tuple[np.ndarray, ...]:
        rows_of_order = [order.rows(int(step))[self._slice] for order in self._orders]
        batch = []
        for part in self._parts:
            # Read into one array: stacking the sites afterwards would copy the batch.
            values_SxBxD = np.empty((len(part), len(rows_of_order[0]), self._rows.d(part[0])), self._rows.dtype)
            # One order may serve all columns.
            for site, rows_B, values_BxD in zip(part, itertools.cycle(rows_of_order), values_SxBxD, strict=False):
                self._rows.read(site, rows_B, values_BxD)
            batch.append(values_SxBxD)
        return tuple(batch)


def make_batches(
    rows: Any,
    parts: Parts,
    batch: int,
    seed: int,
    epochs: int,
    window_rows: int,
    slice_of_batch: slice = slice(None),
    same_tokens: bool = False,
) -> grain.MapDataset:
    """Return the training batches of all epochs as a ``grain.MapDataset`` whose element n is batch n.

    Which rows make a batch is a function of the other arguments alone, see the module docstring.

    Args:
      rows: a ``Store``, or ``JoinedRows``.
      parts: the sites of every part of a batch: of the inputs, and for transcoders of the targets.
      batch: number of rows per batch.
      seed: seed of the order of rows.
      epochs: passes over the training rows, each in another order; every row comes once in each.
      window_rows: rows that are shuffled together.
      slice_of_batch: the rows of each batch that are read, such as the rows of one process.
      same_tokens: rows are the same tokens at all sites, see ``columns_of``; otherwise at an input and its target.

    Returns:
      Batches; each has for every part an array [sites, rows, d] of the rows' ``dtype``.
    """
    columns = usable_of_columns(rows, parts, same_tokens)
    orders = [BatchOrder(usable, batch, seed, epochs, window_rows) for usable in columns]
    return grain.MapDataset.source(_Batches(rows, parts, orders, slice_of_batch))


def usable_of_columns(rows: Any, parts: Parts, same_tokens: bool = False) -> list[RowRange]:
    """Return the training rows that are no sinks of each column; one range if it is the same for all columns.

    For ``parts`` and ``same_tokens`` see ``columns_of``.
    """
    columns = [rows.usable("train", *sites) for sites in columns_of(parts, same_tokens)]
    are_alike = all(np.array_equal(usable.excluded, columns[0].excluded) for usable in columns)
    return columns[:1] if are_alike else columns


def columns_of(parts: Parts, same_tokens: bool = False) -> list[tuple[str, ...]]:
    """Return the sites of each column of a batch, at whose sinks its rows are left out.

    Args:
      parts: the sites of every part of a batch.
      same_tokens: a row is the same token in all columns, and left out where it is a sink at any of the sites.
    """
    every = tuple(sites_of(parts))
    return [every if same_tokens else tuple(dict.fromkeys(column)) for column in zip(*parts, strict=True)]


def sites_of(parts: Parts) -> list[str]:
    """Return the distinct sites of a batch's parts."""
    return list(dict.fromkeys(site for part in parts for site in part))

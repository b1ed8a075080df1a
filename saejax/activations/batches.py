"""Training batches from a store, through Grain.

One element of the Grain dataset is one batch, and its index is the step's number. So the position in the data is
the step, and a run that resumes at step n asks for element n: no state of an iterator has to be saved.

Epoch e visits the training rows in the order ``numpy.random.default_rng([seed, e]).permutation(rows)``, of which two
epochs are kept at most. The order does not depend on the number of processes, nor on whether the rows are read from
disk or stand on the devices: batch i is a stretch of it. What does not fill a batch at the end of an epoch is left out.
"""

import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from saejax.activations.store import Store

Parts = Sequence[Sequence[str]]
# Two threads keep two gathers going, which hides the disk; more would take the processor from the training step.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class BatchOrder:
    """Which training rows make each batch.

    Args:
      rows: number of training rows.
      batch: rows per batch.
      seed: of the order.
      epochs: passes over the rows, each in another order; every row comes once in each.
    """

    def __init__(self, rows: int, batch: int, seed: int, epochs: int):
        self._rows, self._batch, self._seed = rows, batch, seed
        self._per_epoch = rows // batch
        self._length = self._per_epoch * epochs
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of batches of all epochs."""
        return self._length

    def places(self, step: int) -> np.ndarray:
        """Places [batch] among the training rows, from 0, of batch ``step``, from 0."""
        epoch, index = divmod(step, self._per_epoch)
        return self._order(epoch)[index * self._batch : (index + 1) * self._batch]

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:  # threads that read ahead into the next epoch would each draw its order
            if epoch not in self._orders:
                self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._rows)
            return self._orders[epoch]


class _Batches:
    """Random access to the batches of all epochs; a Grain data source."""

    def __init__(self, store: Store, parts: Parts, batch: int, seed: int, epochs: int, own: slice):
        self._store, self._parts = store, parts
        self._rows_R = store.rows("train", *sites_of(parts))
        self._order = BatchOrder(len(self._rows_R), batch, seed, epochs)
        self._own = own

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> tuple[np.ndarray, ...]:
        rows_B = self._rows_R[self._order.places(int(step))[self._own]]
        return tuple(np.stack([self._store.read(site, rows_B) for site in part]) for part in self._parts)


def sites_of(parts: Parts) -> list[str]:
    """The sites that are read, each once."""
    return list(dict.fromkeys(site for part in parts for site in part))


def steps_per_epoch(store: Store, parts: Parts, batch: int) -> int:
    """Number of whole batches in the training rows, those that are sinks at any of the sites left out."""
    return len(store.rows("train", *sites_of(parts))) // batch


def training_batches(
    store: Store,
    parts: Parts,
    batch: int,
    seed: int,
    epochs: int,
    first_step: int = 0,
    own: slice = slice(None),
) -> Iterator[tuple[np.ndarray, ...]]:
    """The batches of all epochs from a step on, read ahead in threads.

    Args:
      store: the store.
      parts: the sites of every part of a batch: of the inputs, and for transcoders of the targets.
      batch: rows per step.
      seed: of the order of rows.
      epochs: passes over the training rows, each in another order; every row comes once in each.
      first_step: number of the first batch wanted, from 0.
      own: which of the rows of each batch are read.

    Returns:
      An iterator over batches: for every part an array [sites, rows, d], of the store's dtype. All sites give the same
      rows.
    """
    source = _Batches(store, parts, batch, seed, epochs, own)
    return iter(grain.MapDataset.source(source)[first_step:].to_iter_dataset(_READ_OPTIONS))

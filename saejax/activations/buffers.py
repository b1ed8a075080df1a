"""The rows of the shard or buffer in progress, in the host's memory."""

import concurrent.futures
import dataclasses
import os
import queue
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saejax.activations.plan import Batch, CapturedValues
from saejax.activations.store import BITS, DTYPES
from saejax.activations.writer import SiteShard
from saejax.models.sites import AnySite

THREADS = min(4, os.cpu_count() or 1)  # that copy rows, and as many that write shards


@dataclasses.dataclass
class _Rows:
    """The rows of a site in the shard in progress."""

    vectors_RxD: np.ndarray  #: bits, ``BITS`` of the dtype on disk
    norms_R: np.ndarray  #: float32
    train_sum_D: np.ndarray  #: float64
    #: of the last batch: rows are copied by a thread, which the next batch of the site waits for
    copied: concurrent.futures.Future[None] | None = None


class ShardBuffers:
    """The vectors and norms of the shard in progress.

    The one copy between the model and the store is made by threads while the devices run the next batch: from the
    backend's memory to each row's random place in the buffer, whose memory the file is written from.

    Args:
      widths: width of every site.
      rows: rows of the largest shard.
      dtype: dtype on disk, a key of ``DTYPES``.
      sets: how many buffers of each site there may be: with two, one is filled while the other is written. Memory is
        taken when it is needed.
    """

    def __init__(self, widths: Mapping[AnySite, int], rows: int, dtype: str, sets: int = 1):
        self._widths, self._rows = {str(site): width for site, width in widths.items()}, rows
        self._dtype, self._disk_dtype = DTYPES[dtype], BITS[dtype]
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "copy")
        self._sites: dict[str, _Rows] = {}
        # Those last given back are taken first; None: one that has no memory yet.
        self._free: dict[int, queue.LifoQueue] = {width: queue.LifoQueue() for width in self._widths.values()}
        for width in self._widths.values():
            for _ in range(sets):
                self._free[width].put(None)

    def begin(self) -> None:
        """Start the next shard; what is left of the last one is forgotten."""
        for site in [*self._sites]:
            self.give_back(self.shard(site, 0))

    def take(self, batch: Batch, site: AnySite, values: CapturedValues) -> tuple[int, int] | None:
        """Take the recorded positions of a batch at a site, padding left out.

        Returns:
          Index in the batch and position of the first vector that is not finite, or None.
        """
        rows = self._of(str(site))
        if rows.copied:
            rows.copied.result()
        norm_N = values.norms_BxT[batch.places_N]
        rows.norms_R[batch.row_N] = norm_N
        rows.train_sum_D += values.train_sum_BxD.sum(0, dtype=np.float64)
        rows.copied = self._threads.submit(_copy_rows, batch, values.pieces, rows.vectors_RxD)
        if (is_finite_N := np.isfinite(norm_N)).all():
            return None
        document_N, position_N = batch.places_N
        first = int(np.argmin(is_finite_N))
        return int(document_N[first]), int(position_N[first])

    def shard(self, site: str, rows: int) -> SiteShard:
        """Return the first ``rows`` rows of a site, as views; the site has a new buffer until ``give_back``."""
        self._wait()
        taken = self._of(site)
        del self._sites[site]
        return SiteShard(taken.vectors_RxD[:rows], taken.norms_R[:rows], taken.train_sum_D)

    def give_back(self, shard: SiteShard) -> None:
        """Use the memory of a ``shard`` again, which has been written; any thread may call it."""
        vectors_RxD: Any = shard.vectors_RxD.base
        self._free[vectors_RxD.shape[1]].put(vectors_RxD)

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return a copy of the vectors [n, d] of ``rows`` at a site."""
        self._wait()
        return self._of(site).vectors_RxD[rows].view(self._dtype)

    def norms(self) -> dict[str, np.ndarray]:
        """Return the norm of every row at every site, float32; NaN or infinite if a value is."""
        return {site: self._of(site).norms_R for site in self._widths}

    def _of(self, site: str) -> _Rows:
        """Return the rows of a site in the shard in progress; this waits for a buffer that is being written."""
        if site not in self._sites:
            width = self._widths[site]
            vectors_RxD = self._free[width].get()
            if vectors_RxD is None:
                vectors_RxD = np.empty((self._rows, width), self._disk_dtype)
            self._sites[site] = _Rows(vectors_RxD, np.empty(self._rows, np.float32), np.zeros(width))
        return self._sites[site]

    def _wait(self) -> None:
        for rows in self._sites.values():
            if rows.copied:
                rows.copied.result()


def _copy_rows(batch: Batch, pieces: Sequence[np.ndarray], vectors_RxD: np.ndarray) -> None:
    """Copy the recorded positions of a batch to their rows, each vector as one item: numpy then copies its bytes."""
    item = np.dtype((np.void, vectors_RxD.strides[0]))
    vectors_R = vectors_RxD.view(item)[:, 0]
    documents = (vectors_T for piece in pieces for vectors_T in piece.view(item)[..., 0])
    for vectors_T, first, stop, rows in zip(documents, batch.first_B, batch.stop_B, batch.rows_B, strict=False):
        vectors_R[rows] = vectors_T[first:stop]

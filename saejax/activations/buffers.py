"""The rows of the shard or buffer in progress, in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from saejax.activations.plan import Batch
from saejax.activations.reader import Reader
from saejax.activations.store import DTYPES, ON_DISK
from saejax.activations.writer import SiteShard
from saejax.models.sites import AnySite

if TYPE_CHECKING:  # capture by torch does without JAX
    import jax


class ShardBuffers:
    """The vectors and norms of the shard in progress.

    Args:
      widths: width of every site.
      rows: rows of the largest shard.
      dtype: "float32" or "bfloat16", as stored.
    """

    def __init__(self, widths: Mapping[AnySite, int], rows: int, dtype: str):
        self._dtype, self._disk_dtype, self._train_rows = DTYPES[dtype], ON_DISK[dtype], 0
        self._vectors = {site: np.empty((rows, width), self._dtype) for site, width in widths.items()}
        self._norms = {site: np.empty(rows, np.float32) for site in widths}
        self._sums = {site: np.zeros(width) for site, width in widths.items()}

    def begin(self, train_rows: int) -> None:
        """Start the next shard, of whose rows the first ``train_rows`` are of the train split."""
        self._train_rows = train_rows
        for total_D in self._sums.values():
            total_D[:] = 0

    def take(self, site: AnySite, value_BxTxD: np.ndarray, batch: Batch) -> tuple[int, int] | None:
        """Take the recorded positions of a batch, padding left out.

        Returns:
          Index in the batch and position of the first vector that is not finite, or None.
        """
        for i, (first, stop, rows) in enumerate(zip(batch.first_B, batch.stop_B, batch.rows_B, strict=True)):
            # The one copy between the model and the store: from the backend's memory to the row's random place in the
            # buffer, whose memory the file is written from.
            stored_NxD = value_BxTxD[i, first:stop].astype(self._dtype, copy=False)
            # In fp64 a finite vector has a finite norm, so the norm tells whether the vector is finite.
            wide_NxD = stored_NxD.astype(np.float64)
            norm_N = np.sqrt(np.einsum("nd,nd->n", wide_NxD, wide_NxD))
            self._vectors[site][rows] = stored_NxD
            self._norms[site][rows] = norm_N
            if rows[0] < self._train_rows:  # a document is wholly in one split
                self._sums[site] += wide_NxD.sum(0)
            if not np.isfinite(norm_N).all():
                return i, int(first) + int(np.argmin(np.isfinite(norm_N)))
        return None

    def shard(self, site: AnySite, rows: int) -> SiteShard:
        """Return the first ``rows`` rows of a site, as views."""
        vectors_RxD = self._vectors[site][:rows].view(self._disk_dtype)
        return SiteShard(vectors_RxD, self._norms[site][:rows], self._sums[site])

    def read(self, site: AnySite, rows: np.ndarray) -> np.ndarray:
        """Return a copy of the vectors [n, d] of ``rows`` at a site."""
        return self._vectors[site][rows]

    def norms(self, site: AnySite) -> np.ndarray:
        """Return the norm of every row at a site, float32; NaN or infinite if a value is."""
        return self._norms[site]


class HostBuffers:
    """The vectors of a stream's buffer in progress, in the host's memory.

    Args:
      reader: the model.
      rows: rows of the largest buffer.
      dtype: dtype of the values, "float32" or "bfloat16".
    """

    parts: tuple[jax.Array, ...] | None = None  # on the devices

    def __init__(self, reader: Reader, rows: int, dtype: str):
        self._reader, self._rows = reader, ShardBuffers(reader.widths, rows, dtype)
        self._sites = {str(site): site for site in reader.widths}

    def fill(self, batches: Iterable[Batch]) -> None:
        """Run the batches, in their order. If iterating over them raises, the buffer holds nothing of use."""

        def take(batch: Batch, site: AnySite, value_BxTxD: np.ndarray) -> None:
            self._rows.take(site, value_BxTxD, batch)  # norms tell whether values are finite

        self._reader.read(batches, take)

    def norms(self) -> dict[str, np.ndarray]:
        """Return the norm of every row at every site, float32; NaN or infinite if a value is."""
        return {name: self._rows.norms(site) for name, site in self._sites.items()}

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return the vectors [n, d] of ``rows`` at a ``site``."""
        return self._rows.read(self._sites[site], rows)

"""The rows of the shard or buffer that is being made, in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from saejax.activations.plan import Batch
from saejax.activations.reader import Reader
from saejax.activations.store import DTYPES, on_disk
from saejax.models.sites import AnySite

if TYPE_CHECKING:  # capture by torch does without JAX
    import jax


class ShardBuffers:
    """The vectors and norms of the shard that is being made.

    Args:
      widths: width of every site.
      rows: rows of the largest shard.
      dtype: "float32", "bfloat16" or "float8", as stored.
    """

    def __init__(self, widths: Mapping[AnySite, int], rows: int, dtype: str):
        self._dtype, self._store_dtype = DTYPES[dtype], dtype
        self._vectors = {site: np.empty((rows, width), self._dtype) for site, width in widths.items()}
        self._norms = {site: np.empty(rows, np.float32) for site in widths}

    def take(self, site: AnySite, value_BxTxD: np.ndarray, batch: Batch) -> tuple[int, int] | None:
        """Takes the recorded positions of a batch; padding is not among them.

        Returns:
          Index in the batch and position of the first vector that is not finite, or None.
        """
        for i, (first, stop, rows) in enumerate(zip(batch.first_B, batch.stop_B, batch.rows_B, strict=True)):
            # The one copy between the model and the store: from the backend's memory to the row's random place in the
            # buffer, whose memory the file is written from. JAX reads that file through a memory map.
            stored_NxD = value_BxTxD[i, first:stop].astype(self._dtype, copy=False)
            # In fp64 a finite vector has a finite norm, so that the norm tells whether the vector is.
            wide_NxD = stored_NxD.astype(np.float64)
            norm_N = np.sqrt(np.einsum("nd,nd->n", wide_NxD, wide_NxD))
            self._vectors[site][rows] = stored_NxD
            self._norms[site][rows] = norm_N
            if not np.isfinite(norm_N).all():
                return i, int(first) + int(np.argmin(np.isfinite(norm_N)))
        return None

    def parts(self, rows: int) -> dict[str, np.ndarray]:
        """The first rows, for ``StoreWriter.write_shard``: views, but of float8."""
        parts = {}
        for site in self._vectors:
            vectors, norms = self._vectors[site][:rows], self._norms[site][:rows]
            parts[str(site)] = on_disk(vectors, norms, self._store_dtype)
            parts[f"{site} norms"] = norms
        return parts


class HostBuffers:
    """The vectors of the buffer of a stream that is being made, in the host's memory.

    Args:
      reader: the model.
      rows: of the largest buffer.
      dtype: "float32" or "bfloat16", of the values.
    """

    parts: tuple[jax.Array, ...] | None = None  # on the devices

    def __init__(self, reader: Reader, rows: int, dtype: str):
        self._reader, self._dtype = reader, DTYPES[dtype]
        self._rows = ShardBuffers(reader.widths, rows, dtype)
        self._held = self._rows.parts(rows)

    def fill(self, batches: Iterable[Batch]) -> None:
        """Runs the batches, in their order. If iterating over them raises, the buffer holds nothing of use."""

        def take(batch: Batch, site: AnySite, value_BxTxD: np.ndarray) -> None:
            self._rows.take(site, value_BxTxD, batch)  # norms tell whether values are finite

        self._reader.read(batches, take)

    def norms(self) -> dict[str, np.ndarray]:
        """The norm of every row at every site, float32; NaN or infinite if a value is."""
        return {str(site): self._held[f"{site} norms"] for site in self._reader.widths}

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """The vectors [n, d] of ``rows`` at a ``site``."""
        return self._held[site][rows].view(self._dtype)

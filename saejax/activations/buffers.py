"""The rows of the shard or buffer in progress, in the host's memory."""

from collections.abc import Mapping

import numpy as np

from saejax.activations.plan import Batch
from saejax.activations.store import DTYPES, ON_DISK
from saejax.activations.writer import SiteShard
from saejax.models.sites import AnySite


class ShardBuffers:
    """The vectors and norms of the shard in progress.

    Args:
      widths: width of every site.
      rows: rows of the largest shard.
      dtype: "float32" or "bfloat16", as stored.
    """

    def __init__(self, widths: Mapping[AnySite, int], rows: int, dtype: str):
        self._dtype, self._disk_dtype, self._train_rows = DTYPES[dtype], ON_DISK[dtype], 0
        self._vectors = {str(site): np.empty((rows, width), self._dtype) for site, width in widths.items()}
        self._norms = {str(site): np.empty(rows, np.float32) for site in widths}
        self._sums = {str(site): np.zeros(width) for site, width in widths.items()}

    def begin(self, train_rows: int) -> None:
        """Start the next shard, of whose rows the first ``train_rows`` are of the train split."""
        self._train_rows = train_rows
        for total_D in self._sums.values():
            total_D[:] = 0

    def take(self, batch: Batch, site: AnySite, value_BxTxD: np.ndarray) -> tuple[int, int] | None:
        """Take the recorded positions of a batch at a site, padding left out.

        Returns:
          Index in the batch and position of the first vector that is not finite, or None.
        """
        name = str(site)
        for i, (first, stop, rows) in enumerate(zip(batch.first_B, batch.stop_B, batch.rows_B, strict=True)):
            # The one copy between the model and the store: from the backend's memory to the row's random place in the
            # buffer, whose memory the file is written from.
            stored_NxD = value_BxTxD[i, first:stop].astype(self._dtype, copy=False)
            # In fp64 a finite vector has a finite norm, so the norm tells whether the vector is finite.
            wide_NxD = stored_NxD.astype(np.float64)
            norm_N = np.sqrt(np.einsum("nd,nd->n", wide_NxD, wide_NxD))
            self._vectors[name][rows] = stored_NxD
            self._norms[name][rows] = norm_N
            if rows[0] < self._train_rows:  # a document is wholly in one split
                self._sums[name] += wide_NxD.sum(0)
            if not np.isfinite(norm_N).all():
                return i, int(first) + int(np.argmin(np.isfinite(norm_N)))
        return None

    def shard(self, site: str, rows: int) -> SiteShard:
        """Return the first ``rows`` rows of a site, as views."""
        vectors_RxD = self._vectors[site][:rows].view(self._disk_dtype)
        return SiteShard(vectors_RxD, self._norms[site][:rows], self._sums[site])

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return a copy of the vectors [n, d] of ``rows`` at a site."""
        return self._vectors[site][rows]

    def norms(self) -> dict[str, np.ndarray]:
        """Return the norm of every row at every site, float32; NaN or infinite if a value is."""
        return self._norms

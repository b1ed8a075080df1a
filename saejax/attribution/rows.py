"""Batches of targets, and the program run on them."""

from collections.abc import Iterator

import jax
import numpy as np

from saejax.attribution.backward import Batch, contributions
from saejax.attribution.replacement import Replacement
from saejax.attribution.sources import Sources
from saejax.causal.ablation import lagging
from saejax.parallel import by_row

_LENGTHS = 4  # most different numbers of positions that are worked on, each of which is compiled
_WORTH = 6  # batches that have to be at hand for each
_BATCH_TOKENS = {
    "cpu": 1024,
    "gpu": 1 << 15,
    "tpu": 1 << 15,
}  # positions of all targets of a batch on a device together


class Rows:
    """Attributes targets in batches.

    Args:
      replacement: the model.
      sources: what contributions come from.
      count: number of targets that will come.
    """

    def __init__(self, replacement: Replacement, sources: Sources, count: int):
        self._replacement, self._sources = replacement, sources
        mesh, length = replacement.model.mesh, replacement.streams.stream_LxTxD.shape[1]
        self._shards, self._budget = mesh.shape["data"], _BATCH_TOKENS[mesh.devices.flat[0].platform]
        batches = count * length // (self._budget * self._shards)
        step = -(-length // min(max(batches // _WORTH, 1), _LENGTHS))
        self._lengths = np.array([*range(step, length, step), length])
        self._streams = [replacement.streams.stream_LxTxD[:, :length] for length in self._lengths]
        self._stops = [sources.stop_X(length) for length in self._lengths]

    def __call__(
        self,
        layer_R: np.ndarray,
        position_R: np.ndarray,
        vector_RxD: np.ndarray,
        into_RxS: np.ndarray,
        in_stream: bool = False,
    ) -> None:
        """Writes what each source contributes to each target.

        Args:
          layer_R: int32 layer whose transcoder reads; or, of the stream, the layer that it enters.
          position_R: int32 where.
          vector_RxD: the directions that are read.
          into_RxS: fp32, to be filled.
          in_stream: whether the directions are of the stream.
        """
        if in_stream and len(np.unique(layer_R)) > 1:
            for layer in np.unique(layer_R):
                own = layer_R == layer
                part_RxS = np.empty((own.sum(), into_RxS.shape[1]), np.float32)
                self(layer_R[own], position_R[own], vector_RxD[own], part_RxS, in_stream)
                into_RxS[own] = part_RxS
            return
        batches = list(self._batches(layer_R, position_R))

        def dispatched() -> Iterator[jax.Array]:
            for rows, index, size in batches:
                start = int(layer_R[rows].max()) + (not in_stream)
                filled = np.resize(rows, size)
                yield self._start(index, start, vector_RxD[filled], layer_R[filled], position_R[filled])

        for (rows, _, _), read_BxRxW in zip(batches, lagging(dispatched()), strict=True):
            into_RxS[rows] = self._sources.collect(np.asarray(read_BxRxW)[:, : len(rows)])

    def _batches(self, layer_R: np.ndarray, position_R: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        """Targets of similar position, in each batch of similar layer: which, the number of their length, the size."""
        length_R = np.searchsorted(self._lengths, position_R + 1)
        for index, length in enumerate(self._lengths):
            own = np.flatnonzero(length_R == index)
            own = own[np.argsort(-layer_R[own], kind="stable")]
            size = max(self._budget // int(length), 1) * self._shards
            for start in range(0, len(own), size):
                yield own[start : start + size], index, size

    def _start(self, index: int, start: int, *arrays: np.ndarray) -> jax.Array:
        """Starts the program on a batch of targets at the positions of one of the lengths."""
        model, streams, sources = self._replacement.model, self._replacement.streams, self._sources
        vector_RxD, layer_R, position_R = by_row(model.mesh, *arrays)
        batch = Batch(vector_RxD, layer_R, position_R, np.int32(start))
        places = sources.first_X, self._stops[index]
        fixed = model.params, self._streams[index], streams.skip_LxDxD, sources.bank
        return contributions(self._replacement.frozen, model.mesh, *fixed, *places, batch)

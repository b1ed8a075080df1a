"""Batches of targets, and the program run on them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from saejax.attribution.local.backward import TargetBatch, contributions
from saejax.attribution.local.sources import Sources
from saejax.attribution.local.state import LocalState
from saejax.models.config import DecoderConfig
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import fitting_sharding

Put = Callable[[np.ndarray, np.ndarray], None]  # takes indices of rows [B], and rows over all sources [B, S]

_LENGTHS = 3  # most different numbers of positions that are worked on, each of which is compiled
CHUNKS = 8  # chunks of targets in a batch
_WORTH = 2  # batches that have to be at hand for each length
TOKENS = {"cpu": 256, "gpu": 1 << 14, "tpu": 1 << 14}  # positions of a chunk's targets, together, on each device


def batch_tokens(platform: str, length: int) -> int:
    """Return the total positions of a batch's targets on each device of a platform, for prompts of a length."""
    return CHUNKS * max(TOKENS[platform], length)


def chunk_size(platform: str, length: int, mesh: Mesh) -> int:
    """Return the number of targets of a chunk on a platform's devices, for prompts of a length."""
    return max(TOKENS[platform] // length, 1) * mesh.shape["data"]


def row_flops(model: DecoderConfig, layers: np.ndarray | float, positions: np.ndarray | float) -> float:
    """Return the least number of operations of rows of a graph; a product of [m, k] and [k, n] has 2 m k n.

    That is the transposed projections of values and outputs of attention.

    Args:
      model: of the decoder.
      layers: how many layers each target goes down through, [R] or one number.
      positions: the positions up to its own.
    """
    per_token = 2.0 * model.d_model * model.d_head * (model.n_heads + model.n_kv_heads)
    return float(np.sum(np.asarray(layers, np.float64) * positions)) * per_token


class RowTracer:
    """Attributes targets in batches.

    Args:
      state: the model.
      sources: what contributions come from.
      count: number of targets that will come.
    """

    def __init__(self, state: LocalState, sources: Sources, count: int):
        self._state, self._sources = state, sources
        mesh, length = state.model.mesh, state.stream_LxTxD.shape[1]
        batches = count * length // (TOKENS[mesh.devices.flat[0].platform] * mesh.shape["data"] * CHUNKS)
        # Shorter lengths only where enough targets share them to pay for another program.
        step = -(-length // min(max(batches // _WORTH, 1), _LENGTHS))
        self._lengths = np.array([*range(step, length, step), length])
        self._streams = [state.stream_LxTxD[:, :length] for length in self._lengths]
        self._stops = [sources.stop_X(length) for length in self._lengths]

    def __call__(
        self,
        layer_R: np.ndarray,
        position_R: np.ndarray,
        vector_RxD: np.ndarray,
        put: Put,
        in_stream: bool = False,
    ) -> None:
        """Compute what each source contributes to each target.

        Args:
          layer_R: int32 layer whose transcoder reads; or, of the stream, the layer that it enters.
          position_R: int32 where.
          vector_RxD: the directions that are read.
          put: takes rows and what they are, in any order and from more than one thread.
          in_stream: whether the directions are of the stream.
        """

        def run(batch: tuple[int, list[np.ndarray]]) -> None:
            index, chunks = batch
            read_BxNxRxW = to_host(self._start(index, chunks, layer_R, position_R, vector_RxD, in_stream))
            for chunk, targets in enumerate(chunks):
                put(targets, self._sources.collect(read_BxNxRxW[:, chunk, : len(targets)]))

        # One such program leaves cores of a CPU idle, so two run at a time, on other devices one beside its sorting.
        # Programs that speak with each other over several devices have to start in one order everywhere.
        workers = 2 if self._state.model.mesh.size == 1 else 1
        with ThreadPoolExecutor(workers) as pool:
            # Through a list, so that an error in a thread is raised here.
            list(pool.map(run, self._batches(layer_R, position_R, in_stream)))

    def _batches(
        self, layer_R: np.ndarray, position_R: np.ndarray, in_stream: bool
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield batches of chunks of targets of similar position and layer: the index of their length, and the targets.

        Directions of the stream share a chunk only with others of the same layer. The longest come first, so that of
        workers side by side none is left alone with a long one.
        """
        length_R = np.searchsorted(self._lengths, position_R + 1)
        for index in reversed(range(len(self._lengths))):
            targets = np.flatnonzero(length_R == index)
            # From high layers to low, in the order in which the program takes chunks up.
            targets = targets[np.argsort(-layer_R[targets], kind="stable")]
            changes = np.flatnonzero(np.diff(layer_R[targets]) * in_stream) + 1
            size = self._chunk_size(index)
            chunks = [
                part[start : start + size] for part in np.split(targets, changes) for start in range(0, len(part), size)
            ]
            for start in range(0, len(chunks), CHUNKS):
                yield index, chunks[start : start + CHUNKS]

    def _chunk_size(self, index: int) -> int:
        mesh = self._state.model.mesh
        return chunk_size(mesh.devices.flat[0].platform, int(self._lengths[index]), mesh)

    def _start(
        self,
        index: int,
        chunks: list[np.ndarray],
        layer_X: np.ndarray,
        position_X: np.ndarray,
        vector_XxD: np.ndarray,
        in_stream: bool,
    ) -> jax.Array:
        """Start the program on a batch; chunks are filled up with copies, the batch with chunks that never start."""
        size = self._chunk_size(index)
        filled = np.stack([np.resize(targets, size) for targets in chunks])
        filled_NxR = filled[np.minimum(np.arange(CHUNKS), len(chunks) - 1)]
        start_N = np.zeros(CHUNKS, np.int32)
        # A transcoder reads within its layer, which a target then goes down through, too.
        start_N[: len(chunks)] = layer_X[filled].max(axis=1) + (not in_stream)
        model, sources = self._state.model, self._sources
        arrays = vector_XxD[filled_NxR], layer_X[filled_NxR], position_X[filled_NxR]
        vector_NxRxD, layer_NxR, position_NxR = (
            jax.device_put(array, fitting_sharding(model.mesh, array.shape, None, "data", *[None] * (array.ndim - 2)))
            for array in arrays
        )
        batch = TargetBatch(vector_NxRxD, layer_NxR, position_NxR, start_N)
        fixed = model.params, self._streams[index], self._state.skip_LxDxD, sources.bank
        places = sources.first_X, self._stops[index]
        return contributions(self._state.frozen, model.mesh, *fixed, *places, batch)

"""Rows of graphs: targets carried down through the frozen layers, and what each source contributes to them.

A target is a direction that is read: by a feature, from what the transcoder of its layer reads, or by a logit, from the
stream leaving the last layer. Its cotangent starts there and goes down through the transposed layers. Nothing of a
position after the target's reaches it, and nothing of the layers above; MLPs are not run, but for the norms before
them.

1. ``RowTracer`` puts targets of similar positions and layers into batches of chunks.
2. ``contributions`` carries a batch down, and reads off the products with the sources' blocks at each place.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from saejax.attribution.local.layers import FrozenModel
from saejax.attribution.local.sources import STEP, WIDTH, SourceBank, Sources
from saejax.attribution.local.state import LocalState
from saejax.models.attention import whole_prompt_tables
from saejax.models.config import DecoderConfig
from saejax.models.layers import einsum
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import BY_DOCUMENT, document_devices, fitting_sharding

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
    return max(TOKENS[platform] // length, 1) * document_devices(mesh)


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
        batches = count * length // (TOKENS[mesh.devices.flat[0].platform] * document_devices(mesh) * CHUNKS)
        # Shorter lengths only where enough targets share them to pay for another program.
        step = -(-length // min(max(batches // _WORTH, 1), _LENGTHS))
        self._lengths = np.array([*range(step, length, step), length])
        self._sizes = [chunk_size(mesh.devices.flat[0].platform, int(length), mesh) for length in self._lengths]
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
            size = self._sizes[index]
            chunks = [
                part[start : start + size] for part in np.split(targets, changes) for start in range(0, len(part), size)
            ]
            for start in range(0, len(chunks), CHUNKS):
                yield index, chunks[start : start + CHUNKS]

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
        filled = np.stack([np.resize(targets, self._sizes[index]) for targets in chunks])
        filled_NxR = filled[np.minimum(np.arange(CHUNKS), len(chunks) - 1)]
        start_N = np.zeros(CHUNKS, np.int32)
        # A transcoder reads within its layer, which a target then goes down through, too.
        start_N[: len(chunks)] = layer_X[filled].max(axis=1) + (not in_stream)
        model, sources = self._state.model, self._sources
        arrays = vector_XxD[filled_NxR], layer_X[filled_NxR], position_X[filled_NxR]
        specs = ((None, BY_DOCUMENT, *[None] * (array.ndim - 2)) for array in arrays)
        vector_NxRxD, layer_NxR, position_NxR = (
            jax.device_put(array, fitting_sharding(model.mesh, array.shape, *spec))
            for array, spec in zip(arrays, specs, strict=True)
        )
        batch = TargetBatch(vector_NxRxD, layer_NxR, position_NxR, start_N)
        places = sources.first_X, self._stops[index]
        return contributions(self._state.frozen, model.mesh, self._streams[index], sources.bank, *places, batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetBatch:
    """Targets that go down together, in N chunks of R; the chunks start from high layers to low."""

    vector_NxRxD: jax.Array  #: the directions that are read
    layer_NxR: jax.Array  #: int32 layer whose transcoder reads; for a direction of the stream, the layer of ``start_N``
    position_NxR: jax.Array  #: int32 where
    #: int32, number of layers that the highest target of a chunk goes down through; 0 for a chunk that only fills up
    #: the batch.
    start_N: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def contributions(
    frozen: FrozenModel,
    mesh: Mesh,
    stream_LxTxD: jax.Array,
    bank: SourceBank,
    first_X: jax.Array,
    stops: jax.Array,
    batch: TargetBatch,
) -> jax.Array:
    """Return the products of all blocks of sources with the cotangents of a batch of targets, fp32 [B, N, R, W].

    The constants of a layer, above all its attention weights, are computed once for all chunks. A chunk joins at the
    layer where its highest target reads.

    Args:
      frozen: the model.
      mesh: the devices (static).
      stream_LxTxD: the stream entering each layer, at no more positions than the targets need.
      bank: the sources' vectors in blocks.
      first_X: index of the first block of each place.
      stops: index after the last block of each place at these positions.
      batch: the targets.
    """
    length = stream_LxTxD.shape[1]
    tables, chunks = whole_prompt_tables(frozen.config, length), jnp.arange(len(batch.start_N))

    def placed(chunk: jax.Array, layer: jax.Array) -> jax.Array:
        """Return the directions of a chunk's targets at a layer, at their positions, else 0; [R, T, D]."""
        at_RxT = jnp.arange(length)[None] == batch.position_NxR[chunk][:, None]
        here_RxT = at_RxT & (batch.layer_NxR[chunk] == layer)[:, None]
        return jnp.where(here_RxT[..., None], batch.vector_NxRxD[chunk][:, None], 0)

    def read_off(place: jax.Array, cotangent_NxRxTxD: jax.Array, read_BxNxRxW: jax.Array) -> jax.Array:
        blocks = first_X[place], stops[place]
        return _read_off(bank, *blocks, batch.start_N >= place, cotangent_NxRxTxD, read_BxNxRxW)

    def down(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Take all chunks down through one layer."""
        layer = batch.start_N[0] - 1 - index
        x_TxD = lax.dynamic_index_in_dim(stream_LxTxD, layer, keepdims=False)
        _, pull = jax.vjp(lambda x_TxD: frozen.layer(layer, tables, x_TxD), x_TxD)

        def pull_chunk(chunk: jax.Array, cotangent_NxRxTxD: jax.Array) -> jax.Array:
            in_RxTxD = jax.vmap(lambda *both: pull(both)[0])(cotangent_NxRxTxD[chunk], placed(chunk, layer))
            return lax.dynamic_update_index_in_dim(cotangent_NxRxTxD, in_RxTxD, chunk, 0)

        cotangent_NxRxTxD, read_BxNxRxW = carry
        read_BxNxRxW = read_off(layer + 1, cotangent_NxRxTxD, read_BxNxRxW)
        # Chunks are in the order in which they begin, so that these are the first ones.
        begun = jnp.sum(batch.start_N > layer)
        return lax.fori_loop(0, begun, pull_chunk, cotangent_NxRxTxD), read_BxNxRxW

    carry = _by_target(mesh, jax.vmap(placed)(chunks, batch.start_N), bank)
    cotangent_NxRxTxD, read_BxNxRxW = lax.fori_loop(0, batch.start_N[0], down, carry)
    return read_off(jnp.int32(0), cotangent_NxRxTxD, read_BxNxRxW)


def _read_off(
    bank: SourceBank,
    first: jax.Array,
    stop: jax.Array,
    begun_N: jax.Array,
    cotangent_NxRxTxD: jax.Array,
    read_BxNxRxW: jax.Array,
) -> jax.Array:
    """Fill in the products of a place's blocks with all cotangents there, 0 for chunks that start further down."""

    def body(index: jax.Array, read_BxNxRxW: jax.Array) -> jax.Array:
        start = first + index * STEP
        position_C = lax.dynamic_slice_in_dim(bank.position_B, start, STEP)
        row_CxW = lax.dynamic_slice_in_dim(bank.row_BxW, start, STEP)
        # Blocks that only fill up a place are at a position out of range, and read 0.
        at_NxRxCxD = cotangent_NxRxTxD.at[:, :, position_C].get(mode="fill", fill_value=0)
        at_NxRxCxD = jnp.where(begun_N[:, None, None, None], at_NxRxCxD, 0)
        products_CxNxRxW = einsum("nrcd,cwd->cnrw", at_NxRxCxD, bank.table_UxD[row_CxW])
        return lax.dynamic_update_slice(read_BxNxRxW, products_CxNxRxW, (start, 0, 0, 0))

    return lax.fori_loop(0, (stop - first + STEP - 1) // STEP, body, read_BxNxRxW)


def _by_target(mesh: Mesh, cotangent_NxRxTxD: jax.Array, bank: SourceBank) -> tuple[jax.Array, jax.Array]:
    """Return the cotangents and the products, 0 at first, each chunk's targets split over ``member`` and ``data``."""
    chunks, targets = cotangent_NxRxTxD.shape[:2]
    read_BxNxRxW = jnp.zeros((len(bank.position_B), chunks, targets, WIDTH), cotangent_NxRxTxD.dtype)
    arrays = cotangent_NxRxTxD, read_BxNxRxW
    specs = (None, BY_DOCUMENT, None, None), (None, None, BY_DOCUMENT, None)
    fits = tuple(fitting_sharding(mesh, array.shape, *spec) for array, spec in zip(arrays, specs, strict=True))
    return lax.with_sharding_constraint(arrays, fits)

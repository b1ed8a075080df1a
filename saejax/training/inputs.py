"""Training batches: from a store, read ahead by threads or resident on the devices; or straight from the model.

All give the same thing, ``batch(n)``: the raw values of step n (from 0), on the devices. Its values are a function of
n and the settings alone, so a run that resumes needs nothing but its step, and the same rows in the same order come
from disk and from device memory: training gives the same bits with both.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from saejax.activations.batches import (
    READ_OPTIONS,
    BatchOrder,
    Parts,
    columns_of,
    make_batches,
    sites_of,
    usable_of_columns,
)
from saejax.activations.device_buffers import check_room
from saejax.activations.documents import Documents
from saejax.activations.joined import with_joined
from saejax.activations.request import CaptureRequest
from saejax.activations.store import Store
from saejax.activations.stream import BufferOrder, ModelStream
from saejax.config import Configs
from saejax.dictionaries.cross_layer import FORMS
from saejax.dictionaries.results import StandIn
from saejax.errors import Interrupted, UserError
from saejax.parallel.collectives import AgreedStop, from_first_process, process_count
from saejax.parallel.mesh import free_bytes, part_size
from saejax.training.held_out import LossScorer
from saejax.training.scales import HELD_OUT_TOKENS, ScaledRows
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack, batch_parts
from saejax.training.state import TrainState

Batch = tuple[jax.Array, ...]
_RESIDENT_SHARE = 0.4  # share of the memory free once the state is placed that "auto" gives to activations


class Batches(Protocol):
    """Batches by step."""

    def batch(self, step: int) -> Batch | None:
        """Return the inputs [sites, B, D] of a step and, for transcoders, the targets.

        None if the process was asked to stop before the batch was made.
        """


Calibrate = Callable[[TrainState], jax.Array | None]  # a state to the thresholds that training ends with, or none


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A stack that was fine-tuned through the model."""

    state: TrainState  #: the state, with other parameters
    records: Sequence[Sequence[Mapping[str, float]]]  #: metrics of each member and step
    #: of each member the scores on held-out text before and after; empty without held-out text
    scores: Sequence[tuple[StandIn, StandIn]]


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a stack's activations."""

    rows: ScaledRows  #: widths, norms, the model, and rows from which scales are estimated
    per_epoch: int  #: number of batches of an epoch
    #: returns the batches of a stack; called when the train state is on the devices.
    open: Callable[[TrainStack], Batches]
    close: Callable[[], None] = lambda: None  #: frees memory
    #: returns a scorer of the members in the whole model, called before training; None: there is no model.
    loss_scorer: Callable[[TrainStack], LossScorer] | None = None
    #: fine-tunes a trained state through the model, given what calibrates thresholds; None: there is no model.
    finetune: Callable[[TrainStack, TrainState, Calibrate], Finetuned] | None = None


def store_source(config: TrainConfig, store: Store, parts: Parts, say: Callable[[str], None] = print) -> Source:
    """Return the training rows of a store as a source.

    Args:
      config: the settings.
      store: the store.
      parts: the sites of every part of a batch.
      say: logs where activations are kept.
    """
    rows = with_joined(store, sites_of(parts))
    # Of all rows, because sinks, which differ from site to site, must not change the length of a member's training.
    most, least = len(rows.usable("train")), min(map(len, usable_of_columns(rows, parts, config.form in FORMS)))
    per_epoch = most // config.batch if least >= config.batch else 0
    return Source(rows, per_epoch, lambda stack: open_store(stack, rows, say))


def open_store(stack: TrainStack, store: Store, say: Callable[[str], None] = lambda line: None) -> Batches:
    """Return the batches of a store as ``--train.input`` asks: streamed, or resident on the devices.

    Raises:
      UserError: the activations are to be resident and exceed the free memory.
    """
    config, parts = stack.config, batch_parts(stack.members)
    columns = usable_of_columns(store, parts, stack.is_cross_layer)
    needed, free = resident_bytes(stack, store, max(map(len, columns))), free_bytes(stack.mesh)
    mode = config.input
    if mode == "auto":  # the memory of CPU devices is the host's, where the page cache holds what was read
        fits = needed <= _RESIDENT_SHARE * free and stack.platform != "cpu"
        # Free memory differs between processes, and all have to choose the same.
        mode = "resident" if from_first_process(np.int32(fits)) else "streamed"
    if mode == "streamed":
        return StreamedBatches(stack, store)
    if not from_first_process(np.int32(needed <= free)):
        raise UserError(
            f"--train.input=resident would put {needed / 1e9:.2f} GB of activations on each device, of which "
            f"{free / 1e9:.2f} GB are free: use --train.input=streamed, or more devices on --mesh.data or --mesh.model"
        )
    say(f"activations are resident: {needed / 1e9:.3f} GB on each device of {free / 1e9:.1f} GB free")
    rows_of_columns = [usable.rows() for usable in columns]
    arrays = tuple(place_rows(stack, store, part, rows_of_columns) for part in parts)
    arguments = (config.batch, config.seed[0], config.epochs, config.buffer_rows)
    orders = [BatchOrder(usable, *arguments) for usable in columns]
    return ResidentBatches(stack, arrays, lambda step: np.stack([order.ranks(step) for order in orders]))


class StreamedBatches:
    """Batches of a store, read ahead by threads. Asked for in turn they are fast; any other can be asked for too."""

    def __init__(self, stack: TrainStack, store: Store):
        config = stack.config
        self._stack, self._rows = stack, local_rows(stack)
        arguments = (config.batch, config.seed[0], config.epochs, config.buffer_rows)
        self._data = make_batches(store, batch_parts(stack.members), *arguments, self._rows, stack.is_cross_layer)
        self._ahead: Iterator[tuple[np.ndarray, ...]] = iter(())
        self._next = -1

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        # Out of turn after a resume and for thresholds: reading ahead starts anew.
        if step != self._next:
            self._ahead = iter(self._data[step:].to_iter_dataset(READ_OPTIONS))
        self._next = step + 1
        return tuple(self._place(part) for part in next(self._ahead))

    def _place(self, part_SxRxD: np.ndarray) -> jax.Array:
        """Return the whole batch on the devices, of which this process has the rows of its own devices."""
        batch, first = self._stack.config.batch, self._rows.start

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(batch)
            return part_SxRxD[index[0], start - first : stop - first, index[2]]

        shape = (part_SxRxD.shape[0], batch, part_SxRxD.shape[2])
        return jax.make_array_from_callback(shape, self._stack.batch_sharding, shard)


class ResidentBatches:
    """Batches of rows that are on the devices.

    Args:
      stack: what is trained.
      arrays: for each part of a batch the rows [sites, rows, d]; bfloat16 may come as uint16.
      indices: returns the rows [sites, B], among these, of the batch of a step; [1, B]: the same at all sites.
    """

    def __init__(self, stack: TrainStack, arrays: Batch, indices: Callable[[int], np.ndarray]):
        self.arrays, self.indices = arrays, indices
        self._take = jax.jit(functools.partial(_take_rows, stack), out_shardings=stack.batch_sharding)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        return self._take(self.arrays, self.indices(step).astype(np.int32))


def _take_rows(stack: TrainStack, arrays: Batch, index_SxB: jax.Array) -> Batch:
    # clip: the indices are in range, and the default would check each of them.
    if len(index_SxB) == 1:
        taken = [jnp.take(rows_SxRxD, index_SxB[0], axis=1, mode="clip") for rows_SxRxD in arrays]
    else:
        take = jax.vmap(functools.partial(jnp.take, axis=0, mode="clip"))
        taken = [take(rows_SxRxD, index_SxB) for rows_SxRxD in arrays]
    # Devices along ``model`` have parts of all vectors: at most those of the batch are put together, not of all rows.
    taken = [lax.with_sharding_constraint(x, stack.rows_sharding(x.shape[2])) for x in taken]
    return tuple(lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x for x in taken)


def model_source(
    configs: Configs,
    parts: Parts,
    documents: Callable[[CaptureRequest], Documents],
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
) -> Source:
    """Return the model's activations on the corpus's training text as a source, with the first buffer made.

    For the arguments see ``ModelStream``.

    Raises:
      UserError: several processes with values that pass through the host, a buffer smaller than a batch, or what
        ``ModelStream`` refuses.
      Interrupted: asked to stop.
    """
    config = configs[TrainConfig]
    if config.buffer_rows < config.batch:
        raise UserError(f"--train.buffer_rows={config.buffer_rows} is less than one batch of {config.batch}: raise it")
    # All processes make a buffer together, and agree on the batch at which they stop.
    stream = ModelStream(configs, parts, config.buffer_rows, documents, say, AgreedStop(stopping))
    if process_count() > 1 and stream.on_devices is None:
        raise UserError(
            "--train.source=model runs in several processes with --model.backend=jax, one model and no joined sites "
            "alone: use --mesh.processes=1, or capture a store"
        )
    steps = config.count_steps(_buffer_order(config, stream).per_epoch)
    is_scored = 0 < config.score_every <= steps
    if (is_scored and not stream.read_held_out(HELD_OUT_TOKENS)) or not stream.fill(0):
        raise Interrupted("stopped before the first step: run the same command to start again")
    stream = with_joined(stream, sites_of(parts))
    per_epoch = _buffer_order(config, stream).per_epoch
    return Source(stream, per_epoch, lambda stack: ModelBatches(stack, stream), stream.close)


def _buffer_order(config: TrainConfig, stream: ModelStream) -> BufferOrder:
    return BufferOrder([stream.size(i) for i in range(len(stream))], config.batch, config.seed[0])


class ModelBatches:
    """Batches straight from the model: buffer after buffer, each resident in its turn.

    The step says which buffer it reads and which of its rows. A run that resumes makes the first buffer again, for
    scales and the sink rule, and then the one it was in.

    Args:
      stack: what is trained.
      stream: the stream, whose first buffer is made.

    Raises:
      UserError: a buffer does not fit on the devices.
    """

    def __init__(self, stack: TrainStack, stream: ModelStream):
        self._stack, self._stream, self._parts = stack, stream, batch_parts(stack.members)
        self._order = _buffer_order(stack.config, stream)
        self._largest = max(stream.size(i) for i in range(len(stream)))
        if stream.on_devices is None:
            check_room(stack.mesh, self._largest, resident_bytes(stack, stream, self._largest))
        self._resident = ResidentBatches(stack, (), lambda step: self._batches_SxNxB[:, step - self._first])
        self._buffer, self._epoch, self._first = 0, -1, 0  # the first buffer is made, but not yet resident
        self._batches_SxNxB = np.zeros((1, 0, stack.config.batch), np.int64)

    def batch(self, step: int) -> Batch | None:
        """Return the batch of a step; None if the process was asked to stop while its buffer was made."""
        epoch, buffer, first, _ = self._order.locate(step)
        if (epoch, buffer) != (self._epoch, self._buffer) and not self._load(epoch, buffer, first):
            return None
        return self._resident.batch(step)

    def _load(self, epoch: int, buffer: int, first: int) -> bool:
        """Put a buffer on the devices; return False if the process was asked to stop."""
        self._resident.arrays, self._epoch = (), -1  # its memory is for the next
        if buffer != self._buffer and not self._stream.fill(buffer):
            self._buffer = -1
            return False
        stack, stream = self._stack, self._stream
        columns = [stream.rows("train", *sites) for sites in columns_of(self._parts, stack.is_cross_layer)]
        if not all(map(len, columns)):
            raise UserError(
                f"all {stream.size(buffer)} tokens of buffer {buffer + 1} are attention sinks: raise "
                "--train.buffer_rows or --capture.sink_factor"
            )
        # All buffers in one shape, so that taking batches from them is compiled once.
        self._resident.arrays = stream.on_devices or tuple(
            place_rows(stack, stream, part, [np.arange(stream.size(buffer))], self._largest) for part in self._parts
        )
        batches = [rows_R[self._order.places(epoch, buffer, len(rows_R))] for rows_R in columns]
        self._batches_SxNxB = np.stack(batches)
        self._epoch, self._buffer, self._first = epoch, buffer, first
        return True


def local_rows(stack: TrainStack) -> slice:
    """Return the rows of each batch that this process's devices hold, and what lies between."""
    batch = stack.config.batch
    where = NamedSharding(stack.mesh, PartitionSpec(*stack.batch_sharding.spec[:2]))
    shards = where.addressable_devices_indices_map((len(stack.sites), batch)).values()
    ends = [index[1].indices(batch) for index in shards if index]
    return slice(min(start for start, _, _ in ends), max(stop for _, stop, _ in ends))


def resident_bytes(stack: TrainStack, rows: Store | ModelStream, count: int) -> int:
    """Return the bytes of activations that each device would hold of this number of rows."""
    shapes = [_resident_shape(stack, rows, part, count) for part in batch_parts(stack.members)]
    sizes = (part_size(stack.mesh.shape, shape, *stack.rows_sharding(shape[2]).spec) for shape in shapes)
    return sum(sizes) * rows.dtype.itemsize


def _resident_shape(
    stack: TrainStack, rows: Store | ModelStream, part: Sequence[str], count: int
) -> tuple[int, int, int]:
    devices = stack.mesh.shape["data"]
    return len(part), -(-count // devices) * devices, rows.d(part[0])


def place_rows(
    stack: TrainStack, rows: Store | ModelStream, part: Sequence[str], columns: Sequence[np.ndarray], size: int = 0
) -> jax.Array:
    """Return rows of a part's sites on the devices, [sites, rows, d], in the dtype of the store.

    ``columns`` are the rows of each site, or of all. Rows are split over the ``data`` axis, their vectors over
    ``model``. Every process reads what its own devices hold. Zeros fill up to ``size`` rows, and to a multiple of the
    axis ``data``.
    """
    shape = _resident_shape(stack, rows, part, max(size, *map(len, columns)))

    @functools.lru_cache(maxsize=1)  # devices that differ in the ``model`` axis alone hold parts of the same rows
    def read(first_site: int, last_site: int, first_row: int, last_row: int) -> np.ndarray:
        values = np.zeros((last_site - first_site, last_row - first_row, shape[2]), rows.dtype)
        for index, site in enumerate(part[first_site:last_site]):
            rows_R = columns[(first_site + index) % len(columns)]
            chosen = rows_R[first_row:last_row]
            values[index, : len(chosen)] = rows.read(site, chosen)
        return values

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        sites, local = (axis.indices(size)[:2] for axis, size in zip(index[:2], shape[:2], strict=True))
        return read(*sites, *local)[:, :, index[2]]

    return jax.make_array_from_callback(shape, stack.rows_sharding(shape[2]), shard)

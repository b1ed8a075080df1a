"""Collective operations of a run's processes (agree, wait, gather arrays), and blocks in which one works by itself."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from saejax.parallel.cluster import joined_processes, stop_agreement

_GATHERED_BYTES = 2**28  # of an array that are gathered at once
_alone = [False]  # whether this process works by itself for the time being


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself in a block, on its own devices, as if it were the only one of its run."""
    before, _alone[0] = _alone[0], True
    try:
        yield
    finally:
        _alone[0] = before


def is_alone() -> bool:
    """Return whether this is in a block of ``alone``."""
    return _alone[0]


def process_count() -> int:
    """Return how many processes work together: 1 in a block of ``alone``."""
    return 1 if _alone[0] else jax.process_count()


def is_first_process() -> bool:
    """Return whether this process writes the files that exist once."""
    return _alone[0] or jax.process_index() == 0


def from_first_process(array: np.ndarray | np.generic) -> np.ndarray:
    """Return the first process's array in all processes; all pass one shape and one type of at most 32 bits."""
    return np.asarray(array if process_count() == 1 else multihost_utils.broadcast_one_to_all(array))


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return the whole of an array in every process, wherever its parts are; all processes must call this together."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    host = np.empty(array.shape, array.dtype)
    for index, piece in host_pieces(array):
        host[index] = piece
    return host


def host_pieces(array: jax.Array | np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yield the whole of an array in every process, a piece at a time with its index; all must call this together.

    Pieces of an array that is on this process's devices are the parts of these.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        yield from local_parts(array)
        return
    # Each device gets a copy of a piece. Along the longest axis that is not split it takes as much from every device.
    part = array.sharding.shard_shape(array.shape)
    whole_axes = [axis for axis in range(array.ndim) if part[axis] == array.shape[axis]]
    axis = max(whole_axes, key=lambda axis: array.shape[axis], default=None)
    pieces = -(-array.nbytes // _GATHERED_BYTES)
    if axis is None or pieces < 2:
        yield (slice(None),) * array.ndim, np.asarray(multihost_utils.process_allgather(array, tiled=True))
        return
    size = -(-array.shape[axis] // pieces)
    for start in range(0, array.shape[axis], size):
        index = (*[slice(None)] * axis, slice(start, start + size))
        yield index, np.asarray(multihost_utils.process_allgather(array[index], tiled=True))


def local_parts(array: jax.Array | np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yield the parts of an array that this process's devices hold, on the host, with their indices.

    Of copies on several devices one counts, in one of all processes; an array on the host is one part.
    """
    if not isinstance(array, jax.Array):
        yield (slice(None),) * array.ndim, array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def sum_over_processes(array: np.ndarray) -> np.ndarray:
    """Return the sum of all processes' arrays, of one shape and a type of at most 32 bits; all call this together."""
    return multihost_utils.process_allgather(array).sum(axis=0, dtype=array.dtype)


def wait_for_all(place: str) -> None:
    """Wait until all processes have reached the place of this name."""
    if (processes := joined_processes()) and process_count() > 1:
        processes.barrier(place)
        multihost_utils.sync_global_devices(place)  # devices of CPUs give each other up if they meet 30 s apart


class AgreedStop:
    """A decision to stop, the same in all processes: otherwise some would wait for others that have stopped.

    Processes that work together must ask equally often.

    Args:
      stopping: whether this process was asked to stop.
    """

    def __init__(self, stopping: Callable[[], bool]):
        self._stopping = stopping

    def __call__(self) -> bool:
        """Return whether to stop; all processes get the same answer."""
        stopping = self._stopping()  # asked here, too: a profiler counts these questions
        return stop_agreement().ask() if process_count() > 1 else stopping

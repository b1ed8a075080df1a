"""Collective operations of a run's processes (agree, wait, gather arrays), and blocks in which one works by itself."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from saejax.parallel.cluster import joined_processes, stop_agreement

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
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


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

"""What the processes of a run do together: agree, wait for one another, gather arrays; and how one works by itself."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from saejax.parallel.cluster import joined

_alone = [False]  # whether this process works by itself for the time being


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In the block this process works by itself, on its own devices, as if it were the only one of its run."""
    before, _alone[0] = _alone[0], True
    try:
        yield
    finally:
        _alone[0] = before


def is_alone() -> bool:
    """Whether this is in a block of ``alone``."""
    return _alone[0]


def process_count() -> int:
    """How many processes work together: 1 in a block of ``alone``."""
    return 1 if _alone[0] else jax.process_count()


def is_first_process() -> bool:
    """Whether this process writes the files that exist once."""
    return _alone[0] or jax.process_index() == 0


def from_first_process(array: np.ndarray | np.generic) -> np.ndarray:
    """The first process's array, in all processes. All give one of the same shape, of a type of 32 bits at most."""
    return np.asarray(array if process_count() == 1 else multihost_utils.broadcast_one_to_all(array))


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of an array, in every process, wherever its parts are; all processes must ask for it together."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def wait_for_all(place: str) -> None:
    """Waits until all processes have come to the place of this name."""
    if (processes := joined()) and process_count() > 1:
        processes.barrier(place)
        multihost_utils.sync_global_devices(place)  # devices of CPUs give each other up if they meet 30 s apart


class AgreedStop:
    """Whether to stop now; all processes give the same answer, or each would wait for the others.

    JAX agrees on the number of a question, so all processes must ask equally often.

    Args:
      stopping: whether this process was asked to stop.
    """

    def __init__(self, stopping: Callable[[], bool]):
        self._stopping, self._asked = stopping, 0

    def __call__(self) -> bool:
        self._asked += 1
        stopping = self._stopping()  # which others hear of, too: this process gets on
        return multihost_utils.reached_preemption_sync_point(self._asked - 1) if process_count() > 1 else stopping

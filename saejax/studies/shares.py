"""Shares of the host for units that run at once: some of its GPUs, or else of its cores."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from saejax.errors import UserError
from saejax.parallel.gpus import count_gpus, visible_gpus

_TPU_CHIPS = ("accel[0-9]*", "vfio/[0-9]*")


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of the host."""

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  #: variables that name its GPUs
    cores: frozenset[int] = frozenset()  #: that a process may run on; none: all


def shares(count: int) -> list[Share]:
    """Return the host in parts, as equal as they can be.

    Args:
      count: of parts, at least 1; one part is the whole host, as it is.

    Raises:
      UserError: there are fewer GPUs than parts, or without GPUs fewer cores, or the host has TPUs, whose chips belong
        to one process.
    """
    if count == 1:
        return [Share()]
    if gpus := visible_gpus(os.environ, count_gpus()):
        return [Share({"CUDA_VISIBLE_DEVICES": ",".join(gpus[part])}) for part in _parts(len(gpus), count, "GPUs")]
    if any(True for pattern in _TPU_CHIPS for _ in Path("/dev").glob(pattern)):
        raise UserError(f"--at_once={count}: a TPU host's chips belong to one process, leave it at 1")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [Share(cores=frozenset(cores[part])) for part in _parts(len(cores), count, "cores")]


def _parts(total: int, count: int, name: str) -> list[slice]:
    if total < count:
        raise UserError(f"--at_once={count}: this host has {total} {name}, too few for {count} units at once")
    return [slice(total * place // count, total * (place + 1) // count) for place in range(count)]

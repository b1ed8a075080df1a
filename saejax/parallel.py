"""The device mesh, shardings, and the start of processes.

One mesh with the axes ``member``, ``data`` and ``model``: a stack of dictionaries is sharded over
``member``, tokens over ``data``, features and heads over ``model``. The same program runs on one device
and on many hosts.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from saejax.errors import UserError
from saejax.settings import MeshConfig

AXES = ("member", "data", "model")


def start_processes(config: MeshConfig) -> None:
    """Joins this process to the others of a multi-process run; does nothing for a run of one process."""
    if config.processes > 1:
        jax.distributed.initialize(config.coordinator or None, config.processes, config.process_id)


def make_mesh(config: MeshConfig | None = None) -> Mesh:
    """The mesh of a run.

    Args:
      config: the axis sizes; ``data=0`` takes the devices that the other axes leave. None: all devices on ``data``.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    config = config or MeshConfig()
    devices = jax.devices()
    rest = config.member * config.model
    data = config.data or max(1, len(devices) // rest)
    if rest * data != len(devices):
        raise UserError(
            f"--mesh.member={config.member} x --mesh.data={data} x --mesh.model={config.model} is {rest * data} "
            f"devices, but there are {len(devices)}: make the product {len(devices)}"
        )
    shape = (config.member, data, config.model)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def sharding(mesh: Mesh, *spec: str | None) -> NamedSharding:
    """The sharding that splits dimension i over mesh axis ``spec[i]`` (None: not split)."""
    return NamedSharding(mesh, PartitionSpec(*spec))


def fitting_sharding(mesh: Mesh, shape: Sequence[int], *spec: str | None) -> NamedSharding:
    """Like ``sharding``, but what a mesh axis does not divide is replicated."""
    fits = [axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(shape, spec, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*fits))


def is_first_process() -> bool:
    """Whether this process writes the files that exist once."""
    return jax.process_index() == 0


def describe(mesh: Mesh) -> dict:
    """The mesh for a summary: device kinds, axis sizes, processes."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    return dict(
        devices=math.prod(mesh.devices.shape), kinds=kinds, axes=dict(mesh.shape), processes=jax.process_count()
    )

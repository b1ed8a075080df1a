"""Where the models would run: the devices at hand, or a TPU slice that exists in name only."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from saejax.attribution.trace.memory import Room
from saejax.parallel import make_mesh


@dataclasses.dataclass(frozen=True)
class Place:
    """Devices.

    Attributes:
      mesh: the devices.
      limit: bytes of memory on each.
      kind: what they are, for messages.
      shares_host: whether torch's models share their memory: true on a host's CPU and GPU devices, not on a TPU.
    """

    mesh: Mesh
    limit: int
    kind: str
    shares_host: bool

    def room(self, weights: int) -> Room:
        """What is left for an attribution graph beside so many bytes of weights on each device."""
        device = self.mesh.devices.flat[0]
        if device.platform == "cpu":
            return Room(self.limit - weights, (self.limit - weights) * self.mesh.size)
        here = device.client == jax.devices()[0].client
        return Room(self.limit - weights, psutil.virtual_memory().available if here else sys.maxsize)


def find_place(configs: Mapping[str, Any]) -> Place:
    """The slice of ``--preflight.topology``, or the devices at hand, arranged as a mesh.

    Raises:
      UserError: the mesh does not fit the number of devices, there is no such slice, or libtpu is not installed.
    """
    name = configs["preflight"].topology
    if name:
        from saejax.preflight.topology import find_slice

        slice_ = find_slice(name)
        return Place(make_mesh(configs["mesh"], slice_.devices), slice_.limit, f"devices of a {name}", False)
    mesh, device = make_mesh(configs["mesh"]), jax.devices()[0]
    if device.platform == "cpu":  # all of them have the host's memory
        return Place(mesh, psutil.virtual_memory().available // jax.device_count(), "CPU devices", True)
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return Place(mesh, limit, f"{device.device_kind} devices", device.platform != "tpu")

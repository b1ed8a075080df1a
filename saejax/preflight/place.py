"""The devices that models would run on: those at hand, or a TPU slice or nodes that exist in name only."""

import dataclasses

import jax
import psutil
from jax.sharding import Mesh

from saejax.parallel.mesh import make_mesh
from saejax.runner.config import Configs
from saejax.settings import MeshConfig, PreflightConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """Devices.

    Attributes:
      mesh: the devices.
      limit: bytes of memory on each.
      kind: what they are, for messages.
      of_node: how many of them share a node.
      per_process: how many a process has, of which there is one a host; 0: one has all.
      host: the devices of a host by itself, where the compiler of a slice takes no part of a slice.
      stands_for: the platform that the mesh's devices stand for; "": they are what they are.
    """

    mesh: Mesh
    limit: int
    kind: str
    of_node: int
    per_process: int = 0
    host: tuple[jax.Device, ...] = ()
    stands_for: str = ""


def find_place(configs: Configs) -> Place:
    """Return the devices of ``--preflight.topology``, or those at hand, arranged as a mesh.

    Raises:
      UserError: the mesh does not fit the number of devices, there is no such slice, or libtpu is not installed.
    """
    name = configs[PreflightConfig].topology
    if name:
        from saejax.preflight.topology import GPUS, find_slice, host_alone, of_process

        slice_ = find_slice(name)
        mesh, per_process = make_mesh(configs[MeshConfig], slice_.devices), of_process(name, len(slice_.devices))
        stands_for = "gpu" if name.partition(":")[0] in GPUS else ""
        host = host_alone(name) if per_process and not stands_for else ()
        return Place(mesh, slice_.limit, f"devices of a {name}", slice_.of_node, per_process, host, stands_for)
    mesh, device = make_mesh(configs[MeshConfig], jax.devices()), jax.devices()[0]
    per_process = jax.local_device_count() if jax.process_count() > 1 else 0
    if device.platform == "cpu":  # all of them have the host's memory
        limit = psutil.virtual_memory().available // jax.device_count()
        return Place(mesh, limit, "CPU devices", jax.device_count(), per_process)
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return Place(mesh, limit, f"{device.device_kind} devices", jax.local_device_count(), per_process)

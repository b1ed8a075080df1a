"""The devices that programs are compiled for: those at hand, or a TPU slice or nodes of GPUs that need not be there.

libtpu's compiler knows every slice by name. It states the memory that a device of the slice would need; where a
program does not fit, compilation fails and says by how much. GPUs are stood in for by as many devices of the host's
processor: what is on a device is the same, but the processor's compiler widens bfloat16 products and sums to
float32 and fuses less: temporaries, and sums that are sent, are counted up to twice as large as they would be there.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from saejax.config import Configs
from saejax.costs.programs import Program
from saejax.errors import UserError
from saejax.parallel.mesh import free_host_bytes, make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight.results import CompiledProgram
from saejax.stages.preflight.settings import PreflightConfig

# They keep libtpu from asking a metadata server and from taking the machine's one TPU for itself. ``for_libraries`` in
# ``runner/environment.py`` keeps it quiet about not being on a TPU host.
_ENVIRONMENT = dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
_EXCEEDED = re.compile(r"([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = dict(K=2**10, M=2**20, G=2**30, T=2**40)
GPUS = {"a100-40": 40e9, "a100-80": 80e9, "h100": 80e9, "h200": 141e9, "b200": 180e9}  # bytes of memory
# Options of the compiler of CPUs: machine code, which is never run here, is made with the least effort, in a sixth of
# the time. The compiler's earlier work, which decides the memory, is the same but for the fusion of small operations,
# which changes a few kilobytes in the demo's programs, and 0.6 % of the memory in the filling of a tiny buffer.
_LEAST_EFFORT: dict[str, int | bool] = dict(
    xla_backend_optimization_level=0,
    xla_llvm_disable_expensive_passes=True,
    xla_cpu_parallel_codegen_split_count=1,
)
if version("jaxlib").startswith("0.10."):  # later ones have no such option
    _LEAST_EFFORT |= dict(xla_cpu_use_fusion_emitters=False)
_USABLE = 0.9  # of a GPU's memory, which leaves room for its libraries and for what the allocator loses
_NODES = re.compile(r"([\w-]+):(?:(\d+)x)?(\d+)")


@dataclasses.dataclass(frozen=True)
class Place:
    """The mesh of a run that is planned."""

    mesh: Mesh  #: the devices
    limit: int  #: bytes of memory on each
    #: own_devices, host, stands_for: as in ``PlannedRun``.
    own_devices: int = 0
    host: tuple[jax.Device, ...] = ()
    stands_for: str = ""


def find_place(configs: Configs) -> Place:
    """Return the devices of ``--preflight.topology``, or those at hand, arranged as a mesh.

    Raises:
      UserError: the mesh does not fit the number of devices, there is no such slice, or libtpu is not installed.
    """
    name, config = configs[PreflightConfig].topology, configs[MeshConfig]
    if name:
        devices, limit = find_slice(name)
        own_devices = of_process(name, len(devices))
        stands_for = "gpu" if name.partition(":")[0] in GPUS else ""
        host = host_alone(name) if own_devices and not stands_for else ()
        return Place(make_mesh(config, devices), limit, own_devices, host, stands_for)
    device = jax.devices()[0]
    own_devices = jax.local_device_count() if jax.process_count() > 1 else 0
    if device.platform == "cpu":  # all of them have the host's memory
        limit = free_host_bytes() // jax.device_count()
        return Place(make_mesh(config), limit, own_devices)
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return Place(make_mesh(config), limit, own_devices)


class Slice(NamedTuple):
    """Devices that exist in name only, and the bytes of memory of each."""

    devices: Sequence[jax.Device]
    limit: int


def find_slice(name: str) -> Slice:
    """Return the TPU slice, as libtpu knows it, such as "v5e:2x4", or the nodes of GPUs, such as "h100:4x8".

    Raises:
      UserError: libtpu is not installed, or knows no such slice; or JAX has begun with fewer devices.
    """
    if name.partition(":")[0] in GPUS:
        return _stand_ins(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--preflight.topology={name} needs the package libtpu, which is not installed: run "
            "pip install -e '.[tpu]' (it compiles without a TPU), or leave the flag out"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    devices = _devices(name)
    return Slice(devices, _limit(devices[0]))


def of_process(name: str, devices: int) -> int:
    """Return the devices of a process where each host of a slice or each node has one; 0: one process has all.

    Hosts of TPUs have four chips each, but one that is a whole v5e or v6e slice of eight.

    Args:
      name: of the slice or of the nodes.
      devices: how many there are.
    """
    kind, _, layout = name.partition(":")
    of_host = 8 if kind in ("v5e", "v6e") and devices <= 8 else 4
    per_node = int(layout.rpartition("x")[2]) if kind in GPUS else of_host
    return per_node if per_node < devices else 0


def host_alone(name: str) -> tuple[jax.Device, ...]:
    """Return the four chips of a host as a slice of their own: v5e takes programs for whole slices alone."""
    kind, _, layout = name.partition(":")
    return tuple(_devices(f"{kind}:2x2x1" if layout.count("x") == 2 else f"{kind}:2x2"))


def _stand_ins(name: str) -> Slice:
    """Return as many of the host's CPU devices as the nodes have GPUs."""
    match = _NODES.fullmatch(name)
    if not match or not (count := int(match[2] or 1) * int(match[3])):
        raise UserError(f"--preflight.topology={name}: expected GPUs of a node, such as h100:8, or of nodes, h100:4x8")
    if jax.config.jax_num_cpu_devices < count:
        with contextlib.suppress(RuntimeError):  # the devices are there already; perhaps as many
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        begun = f"JAX has begun with {len(devices)} devices"
        raise UserError(f"--preflight.topology={name}: {begun}: run experiments.preflight by itself")
    return Slice(devices[:count], int(_USABLE * GPUS[match[1]]))


def compile_program(program: Program, **options: str) -> jax.stages.Compiled:
    """Compile a program for the devices of its arguments; for CPUs with the least effort, and these ``options``."""
    placed = [leaf.sharding for leaf in jax.tree.leaves(program.arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    devices = next(where.device_set for where in placed if where is not None)  # None: left to the compiler
    return program.lower().compile(_LEAST_EFFORT | options if next(iter(devices)).platform == "cpu" else None)


def compile_for(program: Program, limit: int) -> CompiledProgram:
    """Compile a program, and say what it needs.

    Args:
      program: the program.
      limit: bytes that a device has.
    """
    start, about = time.monotonic(), (program.name, program.size, program.flops, program.runs)
    try:
        compiled = compile_program(program)
    except jax.errors.JaxRuntimeError as error:
        needed = _memory_from_error(error)
        if needed is None:
            raise
        return CompiledProgram(
            *about, needed[0] + _bytes_per_device(program.kept), False, None, time.monotonic() - start
        )
    memory = device_bytes(program, compiled)
    flops = float((compiled.cost_analysis() or {}).get("flops", 0.0))
    return CompiledProgram(*about, memory, memory <= limit, flops, time.monotonic() - start)


def device_bytes(program: Program, compiled: jax.stages.Compiled) -> int:
    """Return the bytes that a compiled program takes on a device, with what its stage keeps there besides."""
    stated = compiled.memory_analysis()
    # The compiler does not count arguments that the program does not use, but they are there.
    memory = max(_bytes_per_device(program.arguments), stated.argument_size_in_bytes) + _bytes_per_device(program.kept)
    return memory + stated.output_size_in_bytes + stated.temp_size_in_bytes - stated.alias_size_in_bytes


def _devices(name: str) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    def find(**options: Any) -> Sequence[jax.Device]:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices

    try:
        return find()
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if name.endswith(":1x1") and "chips_per_host_bounds" in message:
            return find(chips_per_host_bounds=[1, 1, 1])  # a part of a host, which libtpu takes to be 2x2
        raise UserError(
            f"--preflight.topology={name} is not a TPU slice that libtpu knows ({message}): expected a kind and its "
            "layout, such as v5e:2x4, v5p:2x2x2 or v6e:4x4"
        ) from None


def _limit(device: jax.Device) -> int:
    """Return the memory that the compiler has to give on a device: it says so when asked for too much."""
    where = jax.NamedSharding(Mesh(np.array([device]), ("all",)), PartitionSpec())
    huge = jax.ShapeDtypeStruct((2**10, 2**30), jnp.int32, sharding=where)
    try:
        jax.jit(jnp.negative).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        exceeded = _memory_from_error(error)
        if exceeded is None:
            raise
        return exceeded[1]
    raise RuntimeError("the compiler found room for 8 TiB on one device")


def _memory_from_error(error: Exception) -> tuple[int, int] | None:
    """Return bytes needed and available, from the compiler's message; None if it is another error."""
    match = _EXCEEDED.search(str(error))
    if not match:
        return None
    needed, unit, available, available_unit = match.groups()
    return int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[available_unit])


def _bytes_per_device(tree: Any) -> int:
    def size(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct))

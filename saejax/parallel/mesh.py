"""The device mesh and shardings.

One mesh with the axes ``member``, ``data`` and ``model``: a stack of dictionaries is sharded over
``member``, tokens over ``data``, features and heads over ``model``. The same program runs on one device
and on many hosts.
"""

import collections
import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from saejax.errors import UserError
from saejax.parallel.collectives import is_alone
from saejax.parallel.settings import MeshConfig

AXES = ("member", "data", "model")
BY_DOCUMENT = ("member", "data")  # axes over which documents are split, and rows that are no training batch's
Axis = str | tuple[str, ...] | None
_PROCESS_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of Linux, which limit memory


def alone_config(model: int, devices: int) -> MeshConfig:
    """Return how the devices of a process that works ``alone`` are arranged.

    Args:
      model: size of the run's axis ``model``.
      devices: the process's devices.
    """
    return MeshConfig(model=math.gcd(model, devices))


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a run.

    Args:
      config: the axis sizes; ``data=0`` takes the devices that the other axes leave. None: all devices on ``data``.
        One process of several that works ``alone`` has the largest part of ``model`` that divides its own devices, and
        the others on ``data``.
      devices: the devices to use; None: all, or this process's own where it works ``alone``.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    config = config or MeshConfig()
    if devices is None:
        devices = jax.local_devices() if is_alone() else jax.devices()
        if len(devices) < jax.device_count():
            config = alone_config(config.model, len(devices))
    rest = config.member * config.model
    data = config.data or max(1, len(devices) // rest)
    if rest * data != len(devices):
        raise UserError(
            f"--mesh.member={config.member} x --mesh.data={data} x --mesh.model={config.model} is {rest * data} "
            f"devices, but there are {len(devices)}: make the product {len(devices)}"
        )
    arranged = arrange_devices(devices, (config.member, data, config.model))
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def check_mesh(mesh: Any) -> None:
    """Raise a ``UserError`` unless this is a mesh with the axes of this module."""
    if getattr(mesh, "axis_names", None) != AXES:
        raise UserError(
            f"mesh is {mesh!r:.120}: expected one with the axes {', '.join(AXES)}, such as lm.mesh or "
            "saejax.parallel.mesh.make_mesh()"
        )


def arrange_devices(devices: Sequence[jax.Device], shape: Sequence[int]) -> np.ndarray:
    """Return devices as an array of this shape, in which neighbours along its last axes have the fastest links.

    Slices of TPUs, and nodes of GPUs, are joined by a slower network than the devices in them: the first axes go over
    them, as far as their sizes allow. Within a slice, axes follow the links between its chips
    (``jax.experimental.mesh_utils``).

    Args:
      devices: the devices; each process of a run with GPUs has the devices of one node, or one of them.
      shape: sizes that multiply to the number of devices.
    """
    platform = devices[0].platform
    if platform == "tpu" and not _fill_box(devices):
        return np.array(devices).reshape(shape)
    names = dict(tpu="slice_index", gpu="process_index")
    of_part = collections.Counter(getattr(device, names.get(platform, ""), 0) for device in devices)
    splits = dict(allow_split_physical_axes=True)
    if len(of_part) == 1 or len({*of_part.values()}) > 1:
        return mesh_utils.create_device_mesh(shape, devices, **splits)
    outer, left = [], len(of_part)
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    inner = [size // over for size, over in zip(shape, outer, strict=True)]
    by_process = platform == "gpu"
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, process_is_granule=by_process, **splits)


def _fill_box(devices: Sequence[jax.Device]) -> bool:
    """Return whether the chips of each slice fill a box without holes, as a part of a slice may not."""
    slices = collections.defaultdict(set)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].add(tuple(device.coords))
    sizes = (np.ptp(np.array([*coords]), axis=0) + 1 for coords in slices.values())
    return all(len(coords) == math.prod(size) for coords, size in zip(slices.values(), sizes, strict=True))


def mesh_of(array: jax.Array) -> AbstractMesh:
    """Return the mesh of an array, also within a traced function; of size 0 if it is on one device without a mesh."""
    return jax.typeof(array).sharding.mesh


def document_devices(mesh: Mesh) -> int:
    """Return the number of devices over which documents that go through a language model are split."""
    return _axis_size(mesh.shape, BY_DOCUMENT)


def sharding(mesh: Mesh | AbstractMesh, *spec: Axis) -> NamedSharding:
    """Return the sharding that splits dimension i over mesh axis ``spec[i]`` or axes (None: not split)."""
    return NamedSharding(mesh, PartitionSpec(*spec))


def fitting_sharding(mesh: Mesh, shape: Sequence[int], *spec: Axis) -> NamedSharding:
    """Return a sharding like ``sharding``, but replicate dimensions that their mesh axis does not divide.

    Of several axes that do not divide a dimension together, the last ones that do are taken.
    """
    return NamedSharding(mesh, PartitionSpec(*fitting_spec(mesh.shape, shape, *spec)))


def by_row(mesh: Mesh, *arrays: np.ndarray | jax.Array) -> list[jax.Array]:
    """Put arrays on the devices, their rows split over ``member`` and ``data`` where these divide them."""
    return [jax.device_put(array, row_sharding(mesh, array.shape)) for array in arrays]


def by_filled_row(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Put an array on the devices like ``by_row``, behind its rows as many of zeros as it takes to split them."""
    spare = -len(array) % document_devices(mesh)
    return by_row(mesh, np.pad(array, ((0, spare), *[(0, 0)] * (array.ndim - 1))))[0]


def row_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Return where an array of this shape is whose rows are split over ``member`` and ``data``; see ``by_row``."""
    return fitting_sharding(mesh, shape, BY_DOCUMENT, *[None] * (len(shape) - 1))


def spread_sharding(mesh: Mesh | AbstractMesh, rows: int) -> NamedSharding:
    """Return where values of so many rows are: split over all devices if these divide the rows, else as documents are.

    Devices along ``model`` compute the same values: each keeps those of its part of the rows.
    """
    return sharding(mesh, AXES if mesh.size and rows % mesh.size == 0 else BY_DOCUMENT)


def place_on(array: jax.Array | np.ndarray, where: NamedSharding) -> jax.Array:
    """Place an array that is on the host, or on any devices of this process, so that no device gets more than its part.

    An array that is on devices of other processes, too, is on the devices of ``where``.
    """
    if isinstance(array, jax.Array) and array.sharding.device_set == where.device_set:
        return jax.device_put(array, where)
    host = np.asarray(array)
    return read_parts(host.shape, where, host.__getitem__)


def read_parts(
    shape: Sequence[int], where: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Return an array of which ``read`` gives each part by its index, one part after the other.

    Devices that hold the same part share one reading, and each process reads the parts of its own devices alone.
    """
    devices_of: dict[str, list[jax.Device]] = {}
    indices: dict[str, tuple[slice, ...]] = {}
    for device, index in where.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        devices_of.setdefault(str(index), []).append(device)
        indices[str(index)] = index
    arrays = []
    for name, devices in devices_of.items():
        part = read(indices[name])
        arrays += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(tuple(shape), where, arrays)


def everywhere(mesh: Mesh, array: np.ndarray, *spec: Axis) -> jax.Array:
    """Place an array that every process has on the mesh's devices; dimensions beyond ``spec`` are not split."""
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)


def fitting_spec(axes: Mapping[str, int], shape: Sequence[int], *spec: Axis) -> list[Axis]:
    """Return ``spec`` with None for every dimension that its mesh axis, of a size in ``axes``, does not divide."""

    def fit(size: int, axis: Axis) -> Axis:
        """Return the axis, or the last ones of several, that divide a dimension; None if none does."""
        while axis and size % _axis_size(axes, axis):
            axis = axis[1:] if isinstance(axis, tuple) else None
        return axis or None

    return [fit(size, axis) for size, axis in zip(shape, spec, strict=True)]


def part_size(axes: Mapping[str, int], shape: Sequence[int], *spec: Axis) -> int:
    """Return the number of elements that each device holds of an array placed by ``fitting_sharding``."""
    fits = fitting_spec(axes, shape, *spec)
    return math.prod(size // _axis_size(axes, axis) for size, axis in zip(shape, fits, strict=True))


def _axis_size(axes: Mapping[str, int], axis: Axis) -> int:
    """Return the number of devices along an axis, or several together, of sizes in ``axes``."""
    return math.prod(axes[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Make arrays in the host's memory in a block, unless JAX runs without its CPU backend."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names accelerators alone
        return contextlib.nullcontext()


def free_bytes(mesh: Mesh) -> int:
    """Return the free bytes on each device; CPU devices share the host's."""
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    if device.platform == "cpu":
        return free_host_bytes() // jax.local_device_count()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


def free_host_bytes() -> int:
    """Return the memory of the host that this process can take, within the limits of its container and batch job."""
    free = [psutil.virtual_memory().available]
    groups = _PROCESS_GROUPS.read_text().splitlines() if _PROCESS_GROUPS.exists() else []
    for _, controllers, place in (line.split(":", 2) for line in groups):
        first = bool(controllers)  # the first version has a tree for each kind of resource
        if first and "memory" not in controllers.split(","):
            continue
        top, most = (_GROUPS / "memory", "limit_in_bytes") if first else (_GROUPS, "max")
        inner = top / place.lstrip("/")
        for group in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # it limits nothing: it has no such file, or it says "max"
                limit, used = (
                    int((group / f"memory.{name}").read_text())
                    for name in (most, "usage_in_bytes" if first else "current")
                )
                # Pages of files that were read count as used, and are given back on demand.
                read = re.search(r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                free.append(limit - used + int(read[1] if read else 0))
    return max(min(free), 0)

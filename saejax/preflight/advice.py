"""What to change where a model does not fit."""

import dataclasses
from math import prod

from saejax.parallel import AXES
from saejax.preflight.memory import GIB, Axes, device_memory
from saejax.preflight.work import Work

# Slices to propose where a model does not fit: devices, and GiB per device as libtpu's compiler states them.
SLICES = {"v5e:2x4": (8, 15.75), "v6e:2x4": (8, 31.25), "v5p:2x2x2": (8, 95.74), "v5e:4x4": (16, 15.75)}


def advice(work: Work, axes: Axes, limit: int, devices: str, needed: int) -> list[str]:
    """What to change where a model does not fit: up to two changes of flags on as many devices, and TPU slices.

    Args:
      work: what is run.
      axes: sizes of the mesh's axes now.
      limit: bytes per device.
      devices: what they are, for messages.
      needed: bytes per device that it takes now, by estimate or, better, by the compiler.
    """
    scale = max(1.0, needed / device_memory(work, axes).peak)
    count = prod(axes.values())
    found = []
    for change, changed in _changes(work).items():
        if scale * device_memory(changed, axes).peak <= limit:
            found.append(change)
        elif split := _smallest_split(changed, count, limit, scale):
            found.append(f"{change} --mesh.model={split[0]}".strip() + f" on the same {count} {devices}")
    found = [change for change in found if change][:2]
    on_tpu = dataclasses.replace(work, backend="jax")
    for name, (number, gib) in SLICES.items():
        if name not in devices and (split := _smallest_split(on_tpu, number, int(gib * GIB), scale)):
            size, peak = split
            found.append(f"the TPU slice {name} with --mesh.model={size} ({peak / GIB:.1f} of {gib:.1f} GiB each)")
    return found


def _changes(work: Work) -> dict[str, Work]:
    """Other ways to run it: the flags, and the work with them; the work as it is first."""
    changes = {"": work}
    if work.backend == "torch":
        changes["--capture.backend=jax"] = dataclasses.replace(work, backend="jax")
    narrow = [
        f"--{group}.dtype=bfloat16"
        for group, dtype in (("model", work.dtype), ("capture", work.capture))
        if dtype != "bfloat16"
    ]
    if narrow:
        for flags, changed in list(changes.items()):
            both = dataclasses.replace(changed, dtype="bfloat16", capture="bfloat16")
            changes[" ".join([*narrow, flags]).strip()] = both
    return changes


def _smallest_split(work: Work, devices: int, limit: int, scale: float) -> tuple[int, int] | None:
    """The smallest size of the ``model`` axis with which it fits, and the bytes per device then; None if none does."""
    for model in (size for size in range(1, devices + 1) if devices % size == 0):
        axes = dict(zip(AXES, (1, devices // model, model), strict=True))
        peak = int(scale * device_memory(work, axes).peak)
        divides = work.train.batch % axes["data"] == 0 and work.tested.n_features % model == 0
        if peak <= limit and divides:
            return model, peak
    return None

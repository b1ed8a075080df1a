"""What to change where a model does not fit."""

import dataclasses
from math import prod

from saejax.costs.cost import PlannedRun
from saejax.errors import UserError
from saejax.parallel.mesh import AXES
from saejax.preflight.sums import Needs
from saejax.preflight.topology import of_process
from saejax.runner.config import group_name
from saejax.settings import CaptureConfig, ModelConfig, TrainConfig

GIB = 2**30
# Slices to propose where a model does not fit: devices, and GiB per device as libtpu's compiler states them.
SLICES = {"v5e:2x4": (8, 15.75), "v6e:2x4": (8, 31.25), "v5p:2x2x2": (8, 95.74), "v5e:4x4": (16, 15.75)}


def advice(plan: PlannedRun, limit: int, devices: str, needed: int) -> list[str]:
    """What to change where a model does not fit: up to two changes of flags on as many devices, and TPU slices.

    Args:
      limit: bytes per device.
      devices: what they are, for messages.
      needed: bytes per device that it takes now, by estimate or, better, by the compiler.
    """
    plan = dataclasses.replace(plan, mesh=None)
    scale = max(1.0, needed / Needs.of(plan).peak)
    count = prod(plan.axes.values())
    found = []
    for change, changed in _changes(plan).items():
        if scale * Needs.of(changed).peak <= limit:
            found.append(change)
        elif split := _smallest_split(changed, count, limit, scale):
            found.append(f"{change} --mesh.model={split[0]}".strip() + f" on the same {count} {devices}")
    found = [change for change in found if change][:2]
    for name, (number, gib) in SLICES.items():
        on_tpu = dataclasses.replace(plan, torch_here=False, own_devices=of_process(name, number))
        if name not in devices and (split := _smallest_split(on_tpu, number, int(gib * GIB), scale)):
            size, peak = split
            found.append(f"the TPU slice {name} with --mesh.model={size} ({peak / GIB:.1f} of {gib:.1f} GiB each)")
    return found


def _changes(plan: PlannedRun) -> dict[str, PlannedRun]:
    """Other ways to run it: the flags, and the plan with them; the plan as it is first."""
    changes, train = {"": plan}, plan.configs[TrainConfig]
    if plan.axes["data"] > 1 and not train.zero_optimizer:
        split = dataclasses.replace(train, zero_optimizer=True)
        changes["--train.zero_optimizer"] = dataclasses.replace(plan, configs=plan.configs | split)
    if plan.backend == "torch":
        changes["--capture.backend=jax"] = dataclasses.replace(plan, torch_here=False)
    wide = [group for group in (plan.configs[ModelConfig], plan.configs[CaptureConfig]) if group.dtype != "bfloat16"]
    narrow = [f"--{group_name(type(group))}.dtype=bfloat16" for group in wide]
    if narrow:
        for flags, changed in list(changes.items()):
            configs = changed.configs
            for group in wide:
                configs |= dataclasses.replace(group, dtype="bfloat16")
            narrower = dataclasses.replace(changed, configs=configs)
            changes[" ".join([*narrow, flags]).strip()] = narrower
    return changes


def _smallest_split(plan: PlannedRun, devices: int, limit: int, scale: float) -> tuple[int, int] | None:
    """The smallest size of the ``model`` axis with which it fits, and the bytes per device then; None if none does."""
    for model in (size for size in range(1, devices + 1) if devices % size == 0):
        axes = dict(zip(AXES, (1, devices // model, model), strict=True))
        try:
            peak = int(scale * Needs.of(dataclasses.replace(plan, axes=axes)).peak)
        except UserError:  # these axes do not divide it
            continue
        if peak <= limit:
            return model, peak
    return None

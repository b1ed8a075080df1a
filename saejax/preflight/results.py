"""Results of the stage ``preflight``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.costs.cost import DeviceBytes
from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """What the compiler said of a program (`preflight.topology`).

    Attributes:
      name: stage and function.
      size: of its batch, in words.
      flops: of all devices, by formula.
      memory: bytes per device of arguments, results and temporaries, and of what else the stage keeps there.
      fits: whether that is at most what a device has.
      counted_flops: per device, by XLA, which takes the body of a loop once; None where the program does not fit.
      seconds: to compile it.
    """

    name: str
    size: str
    flops: float
    memory: int
    fits: bool
    counted_flops: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class UnitNeeds:
    """What a unit takes, as its stage says it.

    Attributes:
      bytes: of each device, by use.
      counts: other numbers, such as the rows (prompts or items) that are run and their tokens.
      details: what else there is, such as the tokens of a prompt whose attribution graph would fit.
    """

    bytes: DeviceBytes
    counts: Mapping[str, int]
    details: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelNeeds:
    """A model that was checked.

    Attributes:
      name: last part of its path.
      family: of models.
      layers: how many.
      d: width of the residual stream.
      parameters: how many.
      dtype: of weights and products in JAX.
      units: what each unit takes.
      peak_bytes: of a device, for the largest unit or program.
      fits: whether a device has them.
      replicated: what the mesh does not divide, in words.
      programs: that were compiled.
    """

    name: str
    family: str
    layers: int
    d: int
    parameters: int
    dtype: str
    units: Mapping[str, UnitNeeds]
    peak_bytes: int
    fits: bool
    replicated: tuple[str, ...]
    programs: tuple[CompiledProgram, ...]


@dataclasses.dataclass(frozen=True)
class PreflightResults:
    """What will run, whether it fits, and how long it takes.

    Attributes:
      mesh: of the run.
      topology: the slice that programs were compiled for; "" for the devices at hand.
      limit_bytes: memory of a device.
      models: each that was checked.
      documents: of the text that is used; this and what follows up to `seconds` for one model on the devices at hand.
      tokens: of that text, estimated.
      disk_bytes: that the run writes.
      disk_free_bytes: in the workdir.
      matmul_flops_per_second: measured, by dtype.
      seconds: of each stage, estimated.
      parity: model -> kind of tokens -> kind of site -> the largest relative error (`preflight.parity`).
    """

    mesh: MeshShape
    topology: str
    limit_bytes: int
    models: tuple[ModelNeeds, ...]
    documents: int | None = None
    tokens: int | None = None
    disk_bytes: int | None = None
    disk_free_bytes: int | None = None
    matmul_flops_per_second: Mapping[str, float] | None = None
    seconds: Mapping[str, float] | None = None
    parity: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None

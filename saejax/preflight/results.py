"""Results of the stage ``preflight``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.costs.cost import DeviceBytes
from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """What the compiler said of a program (`preflight.topology`)."""

    name: str  #: stage and function
    size: str  #: of its batch, in words
    flops: float  #: of all devices, by formula
    memory: int  #: bytes per device of arguments, results and temporaries, and of what else the stage keeps there
    fits: bool  #: whether that is at most what a device has
    #: per device, by XLA, which takes the body of a loop once; None where the program does not fit
    counted_flops: float | None
    seconds: float  #: to compile it
    #: bytes that a device sends in one run, by kind of collective; None where it does not fit and in older files
    sends: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class UnitNeeds:
    """What a unit takes, as its stage says it."""

    bytes: DeviceBytes  #: of each device, by use
    counts: Mapping[str, int]  #: other numbers, such as the rows (prompts or items) that are run and their tokens
    details: Mapping[str, Any]  #: what else there is, such as the tokens of a prompt whose attribution graph would fit
    flops: float | None = None  #: floating-point operations of its matrix products, by formula; None: a file of before


@dataclasses.dataclass(frozen=True)
class ModelNeeds:
    """A model that was checked."""

    name: str  #: last part of its path
    family: str  #: of models
    layers: int  #: how many
    d: int  #: width of the residual stream
    parameters: int  #: how many
    dtype: str  #: of weights and products in JAX
    units: Mapping[str, UnitNeeds]  #: what each unit takes
    peak_bytes: int  #: of a device, for the largest unit or program
    fits: bool  #: whether a device has them
    replicated: tuple[str, ...]  #: what the mesh does not divide, in words
    programs: tuple[CompiledProgram, ...]  #: that were compiled


@dataclasses.dataclass(frozen=True)
class PreflightResults:
    """What will run, whether it fits, and how long it takes."""

    mesh: MeshShape  #: of the run
    topology: str  #: the slice that programs were compiled for; "" for the devices at hand
    limit_bytes: int  #: memory of a device
    models: tuple[ModelNeeds, ...]  #: each that was checked
    #: of the text that is used; this and what follows up to `seconds` for one model on the devices at hand
    documents: int | None = None
    tokens: int | None = None  #: of that text, estimated
    disk_bytes: int | None = None  #: that the run writes
    disk_free_bytes: int | None = None  #: in the workdir
    matmul_flops_per_second: Mapping[str, float] | None = None  #: measured, by dtype
    seconds: Mapping[str, float] | None = None  #: of each stage, estimated
    #: model -> kind of tokens -> kind of site -> the largest relative error (`preflight.parity`)
    parity: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None

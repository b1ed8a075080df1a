"""Results of the stage ``preflight``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program as its compiler describes it (`preflight.topology`)."""

    name: str  #: stage and function
    size: str  #: of its batch, in words
    flops: float  #: floating-point operations of a call on all devices, by formula
    runs: float  #: estimated number of calls; 0 where the text was not looked at
    memory: int  #: bytes per device of arguments, results and temporaries, and of what else the stage keeps there
    fits: bool  #: whether that is at most what a device has
    #: per device, by XLA, which takes the body of a loop once; None where the program does not fit
    counted_flops: float | None
    seconds: float  #: to compile it


@dataclasses.dataclass(frozen=True)
class ModelNeeds:
    """A model that was checked."""

    name: str  #: last part of its path
    family: str  #: family of models
    layers: int  #: number of layers
    d: int  #: width of the residual stream
    parameters: int  #: number of parameters
    dtype: str  #: of weights and products in JAX
    peak_bytes: int  #: memory of the largest program on a device
    fits: bool  #: whether a device has this memory
    programs: tuple[CompiledProgram, ...]  #: the compiled programs


@dataclasses.dataclass(frozen=True)
class PreflightResults:
    """The programs that will run, their memory and their expected time."""

    mesh: MeshShape  #: mesh of the run
    topology: str  #: the devices that programs were compiled for; "" for the devices at hand
    limit_bytes: int  #: memory of a device
    models: tuple[ModelNeeds, ...]  #: the checked models
    #: of the text that is used; this and what follows up to `device_hours` for one model on the devices at hand
    documents: int | None = None
    tokens: int | None = None  #: estimated number of tokens of the text
    disk_bytes: int | None = None  #: bytes that the run writes to disk
    disk_free_bytes: int | None = None  #: free bytes in the workdir
    host_bytes: int | None = None  #: memory of the host for buffers and checkpoints while dictionaries are trained
    matmul_flops_per_second: Mapping[str, float] | None = None  #: measured speed of matrix products, by dtype
    #: expected time of each stage at the measured speed: of its compiled programs, or of the rows or tokens that
    #: `study`, `interpret`, `patch` and `steer` run
    seconds: Mapping[str, float] | None = None
    device_hours: float | None = None  #: those seconds, times the devices
    #: model -> kind of tokens -> kind of site -> the largest relative error (`preflight.parity`)
    parity: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None

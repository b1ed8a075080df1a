"""Results of the stage ``preflight``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Memory that a model's stages need, bytes per device."""

    model: int  #: the weights in the dtype of `model.dtype`
    captured: int  #: in the dtype of `capture.dtype`: up to the last captured layer if JAX captures
    dictionary: int  #: the largest stack while it is trained
    whole_dictionary: int  #: the same where it is used: every device has all of it
    optimizer: int  #: Adam's two moments, and the gradient
    read: Mapping[str, int]  #: the dictionary that each of the other stages reads
    activations: Mapping[str, int]  #: what comes and goes, by stage
    stages: Mapping[str, int]  #: what each needs in all


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for a slice (`preflight.topology`)."""

    name: str  #: of the program
    size: str  #: of its arrays, in words
    flops: float  #: of all devices, by formula
    memory: int  #: bytes per device of arguments, results and temporaries, and of what else the stage keeps there
    fits: bool  #: whether that is at most what a device has
    #: per device, by XLA, which takes the body of a loop once; None where the program does not fit
    counted_flops: float | None
    seconds: float  #: to compile it


@dataclasses.dataclass(frozen=True)
class GraphNeeds:
    """What attribution graphs take."""

    unit: str  #: of the stage `attribute`
    prompts: int  #: to be traced
    tokens: int  #: of the longest
    rows: int  #: in all
    fitting_tokens: int  #: how many would fit
    bytes: Mapping[str, Mapping[str, int]]  #: by phase, on a device beside the model, and on the host


@dataclasses.dataclass(frozen=True)
class ModelNeeds:
    """A model that was checked."""

    name: str  #: its last part
    family: str  #: of models
    layers: int  #: of the model
    d: int  #: width
    parameters: int  #: of the model
    dtype: str  #: it runs in
    bytes: DeviceBytes  #: by use
    peak_bytes: int  #: what the largest stage needs
    fits: bool  #: whether that is there
    replicated: tuple[str, ...]  #: what the mesh does not divide, in words
    programs: tuple[CompiledProgram, ...]  #: compiled ones
    graphs: GraphNeeds | None  #: None if none are asked for, or nothing is known of them


@dataclasses.dataclass(frozen=True)
class CausalWork:
    """What a unit of patch, probe or study runs."""

    rows: int  #: prompts or items
    tokens: int  #: of these
    fits: int  #: of probes


@dataclasses.dataclass(frozen=True)
class PreflightResults:
    """What will run, whether it fits, and how long it takes."""

    mesh: MeshShape  #: of the run
    topology: str  #: the slice that programs were compiled for; "" for the devices at hand
    limit_bytes: int  #: memory of a device
    models: tuple[ModelNeeds, ...]  #: each that was checked
    #: of the corpus; this and what follows up to `causal` for a single model on the devices at hand
    documents: int | None = None
    tokens: int | None = None  #: of the corpus, estimated
    disk_bytes: int | None = None  #: that the run writes
    disk_free_bytes: int | None = None  #: in the workdir
    matmul_flops_per_second: Mapping[str, float] | None = None  #: measured, by dtype
    seconds: Mapping[str, float] | None = None  #: of each stage, estimated
    causal: Mapping[str, CausalWork] | None = None  #: by unit
    #: model -> kind of tokens -> kind of site -> the largest relative error (`preflight.parity`)
    parity: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None

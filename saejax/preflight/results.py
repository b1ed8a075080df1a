"""Results of the stage ``preflight``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.results import MeshShape


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Memory that a model's stages need, bytes per device.

    Attributes:
      model: the weights in the dtype of `model.dtype`.
      captured: in the dtype of `capture.dtype`: up to the last captured layer if JAX captures.
      dictionary: the largest stack while it is trained.
      whole_dictionary: the same where it is used: every device has all of it.
      optimizer: Adam's two moments, and the gradient.
      read: the dictionary that each of the other stages reads.
      activations: what comes and goes, by stage.
      stages: what each needs in all.
    """

    model: int
    captured: int
    dictionary: int
    whole_dictionary: int
    optimizer: int
    read: Mapping[str, int]
    activations: Mapping[str, int]
    stages: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for a slice (`preflight.topology`).

    Attributes:
      name: of the program.
      size: of its arrays, in words.
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
class GraphNeeds:
    """What attribution graphs take.

    Attributes:
      unit: of the stage `attribute`.
      prompts: to be traced.
      tokens: of the longest.
      rows: in all.
      fitting_tokens: how many would fit.
      bytes: by phase, on a device beside the model, and on the host.
    """

    unit: str
    prompts: int
    tokens: int
    rows: int
    fitting_tokens: int
    bytes: Mapping[str, Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class ModelNeeds:
    """A model that was checked.

    Attributes:
      name: its last part.
      family: of models.
      layers: of the model.
      d: width.
      parameters: of the model.
      dtype: it runs in.
      bytes: by use.
      peak_bytes: what the largest stage needs.
      fits: whether that is there.
      replicated: what the mesh does not divide, in words.
      programs: compiled ones.
      graphs: None if none are asked for, or nothing is known of them.
    """

    name: str
    family: str
    layers: int
    d: int
    parameters: int
    dtype: str
    bytes: DeviceBytes
    peak_bytes: int
    fits: bool
    replicated: tuple[str, ...]
    programs: tuple[CompiledProgram, ...]
    graphs: GraphNeeds | None


@dataclasses.dataclass(frozen=True)
class CausalWork:
    """What a unit of patch, probe or study runs.

    Attributes:
      rows: prompts or items.
      tokens: of these.
      fits: of probes.
    """

    rows: int
    tokens: int
    fits: int


@dataclasses.dataclass(frozen=True)
class PreflightResults:
    """What will run, whether it fits, and how long it takes.

    Attributes:
      mesh: of the run.
      topology: the slice that programs were compiled for; "" for the devices at hand.
      limit_bytes: memory of a device.
      models: each that was checked.
      documents: of the corpus; this and what follows up to `causal` for a single model on the devices at hand.
      tokens: of the corpus, estimated.
      disk_bytes: that the run writes.
      disk_free_bytes: in the workdir.
      matmul_flops_per_second: measured, by dtype.
      seconds: of each stage, estimated.
      causal: by unit.
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
    causal: Mapping[str, CausalWork] | None = None
    parity: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None

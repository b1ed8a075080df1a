"""What a unit of a stage takes, as the stage itself says it beside its code; preflight adds it up."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax import Device
from jax.sharding import Mesh

from saejax.dictionaries import DictionaryConfig, stacks
from saejax.dictionaries.formats import folders_of, read_config
from saejax.errors import one_of
from saejax.models.config import DecoderConfig
from saejax.models.sites import Site
from saejax.parallel.mesh import alone_config, make_mesh
from saejax.runner.config import Configs
from saejax.runner.stage import Stage, is_folder
from saejax.settings import CaptureConfig, ModelConfig

Axes = Mapping[str, int]  # sizes of the mesh's axes
WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}  # bytes
START = 4.0  # seconds on the host in which a unit loads the model and compiles its first programs
CHARACTERS_PER_TOKEN = 4.2  # English text under a vocabulary of about 50,000


@dataclasses.dataclass(frozen=True)
class PlannedStack:
    """Dictionaries that one program will train.

    Attributes:
      dictionary: what its members have in common.
      members: who they are, each with its ``name``, ``site`` and ``target``.
    """

    dictionary: DictionaryConfig
    members: tuple[Any, ...]

    def of(self, member: Any) -> DictionaryConfig:
        """One of them, at its own sites: what they have in common has those of the first."""
        target = member.target if self.dictionary.target else ""
        return dataclasses.replace(self.dictionary, site=member.site, target=target)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """What stages' costs follow from: a configuration, a model, and devices that need not be there.

    Attributes:
      configs: the groups of configuration.
      name: of the model, for messages.
      model: its decoder.
      sites: sites of the decoder that are captured.
      stacks: the dictionaries that are trained, by kind.
      axes: sizes of the mesh's axes.
      documents, tokens: of the text that is used; 0 where seconds and disk are not asked for.
      torch_here: whether torch's models take the memory of the devices.
      mesh: the devices; None where their number alone is considered.
      limit: bytes of memory on each of them.
      own_devices: of each process where there are several; otherwise 0.
      host: devices that are compiled for in their place, where a slice's compiler takes no part of a slice.
      stands_for: the platform of devices for which those of the mesh stand, such as "gpu"; "": they are what they are.
    """

    configs: Configs
    name: str
    model: DecoderConfig
    sites: tuple[Site, ...]
    stacks: Mapping[str, PlannedStack]
    axes: Axes
    documents: int = 0
    tokens: int = 0
    torch_here: bool = True
    mesh: Mesh | None = None
    limit: int = 0
    own_devices: int = 0
    host: tuple[Device, ...] = ()
    stands_for: str = ""

    def placed(self, stage: Stage) -> "PlannedRun":
        """The same on the devices of a stage's units: those of one process, unless all processes run it together."""
        if not self.own_devices or stage.processes == "all":
            return self
        config = alone_config(self.axes["model"], self.own_devices)
        axes = dict(member=1, data=self.own_devices // config.model, model=config.model)
        devices = self.host or (self.mesh.devices.flat[: self.own_devices].tolist() if self.mesh else ())
        mesh = make_mesh(config, devices) if self.mesh else None
        return dataclasses.replace(self, axes=axes, mesh=mesh, own_devices=0)

    @property
    def platform(self) -> str:
        """Of the devices: "cpu", "gpu" or "tpu"."""
        return self.stands_for or (self.mesh.devices.flat[0].platform if self.mesh else "cpu")

    @property
    def dtype(self) -> str:
        """Of the model's weights and products in JAX."""
        return self.configs[ModelConfig].dtype

    @property
    def backend(self) -> str:
        """The backend of capture: "torch" or "jax"."""
        return self.configs[CaptureConfig].backend if self.torch_here else "jax"

    @property
    def capture_dtype(self) -> str:
        """The dtype in which the model runs while it is captured."""
        return self.configs[CaptureConfig].dtype

    def dictionary(self, stage: str) -> DictionaryConfig:
        """The dictionary that ``--<stage>.dictionary`` names.

        Raises:
          UserError: none of this name is trained, or the folder holds none.
        """
        name = self.configs.named(stage).dictionary
        if is_folder(name):
            return read_config(name)
        kind, member = stacks.kind_and_member(name)
        stack = self.stacks[one_of(kind, self.stacks, f"dictionary for {stage} (--train.kinds)")]
        stacks.check_member(name, [entry.name for entry in stack.members], f"--{stage}.dictionary")
        return stack.of(next(entry for entry in stack.members if entry.name == member))

    def dictionaries(self, names: Sequence[str]) -> list[DictionaryConfig]:
        """Those that kinds, members and folders name, all members of a stack each.

        Raises:
          UserError: none of this name is trained, or a folder holds none.
        """
        found: list[DictionaryConfig] = []
        for name in names:
            if is_folder(name):
                found += map(read_config, folders_of(name))
                continue
            kind, _, member = name.partition("/")
            stack = self.stacks[one_of(kind, self.stacks, "dictionary (--train.kinds)")]
            own = [entry for entry in stack.members if entry.name == member] if member else stack.members
            found += [stack.of(entry) for entry in own] or [stack.dictionary]
        return found


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Bytes on each device."""

    model: int = 0  #: weights of the model
    dictionary: int = 0  #: arrays of dictionaries
    optimizer: int = 0  #: Adam's two moments, and the gradient
    activations: int = 0  #: what comes and goes

    @property
    def total(self) -> int:
        """All of them."""
        return self.model + self.dictionary + self.optimizer + self.activations


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a unit takes.

    Attributes:
      bytes: on each device.
      flops: floating-point operations of its matrix products, of all devices.
      dtype: of their operands.
      overhead: time of what else the devices do, as measured, in units of that of the products in float32.
      host_seconds: what takes time beside the devices.
      disk: bytes that it writes.
      batches: by name, how many rows of a batch are split over the ``data`` axis if it divides them.
      counts: what else there is to say of it in numbers, such as rows and tokens.
      lines: what else there is to say of it.
      details: what else goes into preflight's results, as JSON.
    """

    bytes: DeviceBytes = DeviceBytes()
    flops: float = 0.0
    dtype: str = "float32"
    overhead: float = 0.0
    host_seconds: float = 0.0
    disk: int = 0
    batches: Mapping[str, int] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lines: Sequence[str] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def seconds(self, rates: Mapping[str, float]) -> float:
        """How long it takes where large products run at these rates, FLOP/s by dtype; its own are a bit smaller."""
        return self.host_seconds + self.flops * (1.1 / rates[self.dtype] + self.overhead / rates["float32"])

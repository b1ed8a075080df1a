"""A planned run: a configuration, a model known by its shape, and devices that need not be there."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jax import Device
from jax.sharding import Mesh

from saejax.activations.settings import CaptureConfig
from saejax.config import Configs
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.formats import read_config
from saejax.dictionaries.names import check_member, is_folder, kind_and_member
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.settings import ModelConfig
from saejax.models.sites import Site
from saejax.parallel.mesh import alone_config, make_mesh
from saejax.runner.stage import Stage
from saejax.stages.preflight.settings import PreflightConfig
from saejax.training.settings import FORMS, TrainConfig

WIDTH = {"int8": 1, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes
CHARACTERS_PER_TOKEN = 4.2  # English text under a vocabulary of about 50,000


@dataclasses.dataclass(frozen=True)
class PlannedStack:
    """Dictionaries that one program will train."""

    dictionary: DictionaryConfig  #: the configuration that its members share
    members: tuple[Any, ...]  #: the members, each with its ``name``, ``site`` and ``target``

    def of(self, member: Any) -> DictionaryConfig:
        """Return the configuration of a member, at its own sites."""
        target = member.target if self.dictionary.target else ""
        return dataclasses.replace(self.dictionary, site=member.site, target=target)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run that has not begun."""

    configs: Configs  #: the groups of configuration
    name: str  #: name of the model, for messages
    model: DecoderConfig  #: its decoder
    sites: tuple[Site, ...]  #: sites of the decoder that are captured
    stacks: Mapping[str, PlannedStack]  #: the dictionaries that are trained, by kind
    mesh: Mesh  #: the devices
    documents: int = 0  #: number of documents of the text; 0 where it was not looked at
    tokens: int = 0  #: estimated number of its tokens
    own_devices: int = 0  #: devices of each process where there are several; otherwise 0
    #: devices to compile for in place of a process's own, where the compiler of a slice takes no part of a slice.
    host: tuple[Device, ...] = ()
    stands_for: str = ""  #: platform that the devices of the mesh stand for, such as "gpu"; "": they are what they are

    def placed(self, stage: Stage) -> "PlannedRun":
        """Return the plan on the devices of a stage: one process's, unless all processes run it together."""
        if not self.own_devices or stage.processes == "all":
            return self
        config = alone_config(self.mesh.shape["model"], self.own_devices)
        devices = self.host or self.mesh.devices.flat[: self.own_devices].tolist()
        return dataclasses.replace(self, mesh=make_mesh(config, devices), own_devices=0)

    @property
    def platform(self) -> str:
        """Platform of the devices: "cpu", "gpu" or "tpu"."""
        return self.stands_for or self.mesh.devices.flat[0].platform

    @property
    def dtype(self) -> str:
        """Dtype of the model's weights and products in JAX."""
        return self.configs[ModelConfig].dtype

    @property
    def capture_dtype(self) -> str:
        """Dtype in which the model runs while it is captured."""
        return self.configs[CaptureConfig].dtype

    def dictionary(self, stage: str) -> DictionaryConfig:
        """Return the configuration of the dictionary that ``--<stage>.dictionary`` names.

        Raises:
          UserError: no dictionary of this name is trained, or the folder holds none.
        """
        name = self.configs.named(stage).dictionary
        if is_folder(name):
            layers, features = re.findall(r"layer_(\d+)", name), self.configs[PreflightConfig].transcoder_features
            if features and layers and name.startswith("hf://"):
                site, target = f"mlp_in.{layers[-1]}", f"mlp_out.{layers[-1]}"
                d = self.model.d_model
                return DictionaryConfig(kind="standard", site=site, target=target, d_in=d, n_features=features)
            return read_config(name)
        kind, member = kind_and_member(name)
        if kind not in self.stacks:
            raise UserError(
                f"--{stage}.dictionary={name} is no dictionary that is trained here: expected a kind of --train.kinds, "
                f"{', '.join(self.stacks)}, or a folder"
            )
        if (form := self.configs[TrainConfig].form) in FORMS:
            raise UserError(
                f"--{stage}.dictionary={name}: a {form} is no dictionary of one layer: train it with "
                "experiments.train, and trace prompts with --graph.transcoders"
            )
        stack = self.stacks[kind]
        check_member(name, [entry.name for entry in stack.members], f"--{stage}.dictionary")
        return stack.of(next(entry for entry in stack.members if entry.name == member))

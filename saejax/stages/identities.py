"""Fingerprints of what stages read from outside the workdir, for their declarations."""

from collections.abc import Callable, Sequence
from pathlib import Path

from saejax.config import Configs
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.labels import LABELS
from saejax.dictionaries.names import is_folder
from saejax.files import file_sha256, fingerprint
from saejax.models.settings import ModelConfig
from saejax.models.source import other_model, resolve, runs_in_torch
from saejax.runner.stacks import results_folder
from saejax.runner.stage import split_unit, train_units
from saejax.stages.interpret.settings import InterpretConfig
from saejax.tasks import benchmarks, corpora, own_prompts
from saejax.tasks.settings import CorpusConfig, TaskConfig


def model(configs: Configs) -> str:
    """Fingerprint the files of the model, and of a second one, and whether PyTorch runs them.

    ``--model.backend=jax`` refuses other families.
    """
    decoder = configs[ModelConfig].backend == "jax"
    models = [config for config in (configs[ModelConfig], other_model(configs[ModelConfig])) if config]
    return "+".join(
        resolve(config, decoder).fingerprint + ("-torch" if runs_in_torch(config) else "") for config in models
    )


def corpus(configs: Configs) -> str:
    """Fingerprint the text."""
    return corpora.identity(configs[CorpusConfig], configs[TaskConfig])


def training_text(configs: Configs) -> tuple[str, ...]:
    """Return the units that training text is read from."""
    return ("tokenize",) if configs[CorpusConfig].stream else ()


def dictionary(stage: str) -> Callable[[Configs], str]:
    """Return a function that fingerprints the folder of ``--<stage>.dictionary``; "" if it is trained here."""

    def identity(configs: Configs) -> str:
        name = configs.named(stage).dictionary
        return hash_dictionaries(name) if is_folder(name) else ""

    return identity


def dictionaries(stage: str) -> Callable[[Configs], str]:
    """Return a function that fingerprints the folders that ``--<stage>.dictionaries`` names, and their labels."""
    return lambda configs: fingerprint(hash_folders(configs.named(stage).dictionaries))


def split_trained(folder: str | Path) -> tuple[Path, str] | None:
    """Return the workdir of a trained dictionary, and its name there; None if its path has no folder "train"."""
    parts = Path(folder).absolute().parts
    at = max((place for place, part in enumerate(parts) if part == "train"), default=0)
    return (Path(*parts[:at]), "/".join(parts[at + 1 :])) if at else None


def hash_folders(names: Sequence[str]) -> list[str]:
    """Hash the dictionaries that are named by folders, and the labels that the workdirs of these have."""
    folders = [name for name in names if is_folder(name)]
    trained = [place for folder in folders if (place := split_trained(folder))]
    units = [results_folder(workdir, stage, name) for workdir, name in trained for stage in ("interpret", "atlas")]
    # Members are links, which a pattern of two stars does not follow.
    files = [path for unit in units for pattern in (LABELS, f"*/{LABELS}") for path in sorted(unit.glob(pattern))]
    return [*map(file_sha256, files), *map(hash_dictionaries, folders)]


def units_of_labels(configs: Configs, names: Sequence[str]) -> list[str]:
    """Return the units that describe features of dictionaries, where this run makes them."""
    trained = {split_unit(unit)[0] for unit in train_units(*names)}
    kinds = [kind for kind in configs[InterpretConfig].dictionaries if f"train/{kind}" in trained]
    return [f"{stage}/{kind}" for stage in ("interpret", "atlas") for kind in kinds]


def prompts(configs: Configs) -> str:
    """Fingerprint the file of the user's own behaviours."""
    return own_prompts.identity(configs[TaskConfig])


def benchmark(name: str) -> Callable[[Configs], str]:
    """Return a function that fingerprints the items of the benchmark of this name."""
    return lambda configs: benchmarks.identity(name, configs[TaskConfig])

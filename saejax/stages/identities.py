"""Fingerprints of what stages read from outside the workdir, for their declarations."""

from saejax.config import Configs
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.names import is_folder
from saejax.files import fingerprint
from saejax.models.settings import ModelConfig
from saejax.models.source import other_model, resolve, runs_in_torch
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


def dictionary(configs: Configs, stage: str) -> str:
    """Fingerprint the folder that ``--<stage>.dictionary`` names; "" if the dictionary is trained here."""
    name = configs.named(stage).dictionary
    return hash_dictionaries(name) if is_folder(name) else ""


def dictionaries(configs: Configs, stage: str) -> str:
    """Fingerprint the folders that ``--<stage>.dictionaries`` names."""
    return fingerprint([hash_dictionaries(name) for name in configs.named(stage).dictionaries if is_folder(name)])


def prompts(configs: Configs) -> str:
    """Fingerprint the file of the user's own behaviours."""
    return own_prompts.identity(configs[TaskConfig])


def benchmark(configs: Configs, name: str) -> str:
    """Fingerprint the items of the benchmark of this name."""
    return benchmarks.identity(name, configs[TaskConfig])

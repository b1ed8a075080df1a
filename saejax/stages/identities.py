"""Fingerprints of what stages read from outside the workdir, for their declarations."""

from collections.abc import Callable

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


def dictionary(stage: str) -> Callable[[Configs], str]:
    """Return a function that fingerprints the folder of ``--<stage>.dictionary``; "" if it is trained here."""

    def identity(configs: Configs) -> str:
        name = configs.named(stage).dictionary
        return hash_dictionaries(name) if is_folder(name) else ""

    return identity


def dictionaries(stage: str) -> Callable[[Configs], str]:
    """Return a function that fingerprints the folders that ``--<stage>.dictionaries`` names."""
    return lambda configs: fingerprint(
        [hash_dictionaries(name) for name in configs.named(stage).dictionaries if is_folder(name)]
    )


def prompts(configs: Configs) -> str:
    """Fingerprint the file of the user's own behaviours."""
    return own_prompts.identity(configs[TaskConfig])


def benchmark(name: str) -> Callable[[Configs], str]:
    """Return a function that fingerprints the items of the benchmark of this name."""
    return lambda configs: benchmarks.identity(name, configs[TaskConfig])

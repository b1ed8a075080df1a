"""Fingerprints of what stages read from outside the workdir, for their declarations: imports are inside functions."""

from saejax.stage import Configs


def model(configs: Configs) -> str:
    """Of the model's files. A family that the decoder does not know is refused unless only modules are captured."""
    from saejax.models.sites import ModuleSite
    from saejax.models.source import resolve

    decoder = not all(map(ModuleSite.names, configs["capture"].sites))
    return resolve(configs["model"], decoder).fingerprint


def corpus(configs: Configs) -> str:
    """Of the text."""
    from saejax.tasks import corpora

    return corpora.identity(configs["corpus"])


def prompts(configs: Configs) -> str:
    """Of the file of one's own behaviours."""
    from saejax.tasks import own_prompts

    return own_prompts.identity(configs["task"])


def benchmark(configs: Configs, name: str) -> str:
    """Of the items of the benchmark of this name."""
    from saejax.tasks import benchmarks

    return benchmarks.identity(name, configs["task"])

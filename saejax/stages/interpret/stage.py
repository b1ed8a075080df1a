"""The stage ``interpret``."""

from collections.abc import Sequence

from saejax.config import Configs
from saejax.interpret.results import InterpretResults
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages import identities
from saejax.stages.interpret.report import sections
from saejax.stages.interpret.run import run_interpret
from saejax.stages.interpret.settings import InterpretConfig
from saejax.stages.train.members import store_and_dictionaries, trained_sites, units_of_members
from saejax.tasks.settings import TaskConfig


def _names(configs: Configs) -> Sequence[str]:
    return configs[InterpretConfig].dictionaries


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    """Return what is read: the model, text, dictionaries, and prompts if they are asked for."""
    task = configs[TaskConfig]
    prompts = [*(["baseline"] if task.has_behaviours else []), *(f"benchmark/{name}" for name in task.benchmarks)]
    units = (*store_and_dictionaries(configs, name), *(prompts if configs[InterpretConfig].categories else ()))
    return inputs_of(trained_sites(configs), *units, model=identities.model)


INTERPRET = Stage(
    name="interpret",
    summary="says what features mean: examples, tokens, neighbours, labels that are scored, if "
    "--interpret.dictionaries names any",
    revision=10,  # nothing fires at sinks of a transcoder's target; random directions may say tokens
    run=run_interpret,
    results=InterpretResults,
    groups=(ModelConfig, InterpretConfig),
    reads=("baseline", "benchmark", "capture", "train"),
    inputs=_inputs,
    names=_names,
    members=units_of_members,
    processes="items",
    section=sections,
)

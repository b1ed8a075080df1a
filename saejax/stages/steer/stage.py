"""The stage ``steer``."""

from collections.abc import Sequence

from saejax.config import Configs
from saejax.dictionaries.names import folder_name
from saejax.interventions.settings import SteerConfig
from saejax.interventions.steering import SteerResults
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, train_units
from saejax.stages import identities
from saejax.stages.steer.report import sections
from saejax.stages.steer.run import run_steer
from saejax.tasks.settings import CorpusConfig, TaskConfig


def _names(configs: Configs) -> Sequence[str]:
    dictionary = configs[SteerConfig].dictionary
    return (folder_name(dictionary),) if dictionary and configs[TaskConfig].has_behaviours else ()


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    return inputs_of(
        configs,
        "baseline",
        *train_units(configs[SteerConfig].dictionary),
        model=identities.model,
        corpus=identities.corpus,
        dictionary=identities.dictionary("steer"),
    )


STEER = Stage(
    name="steer",
    summary="steers prompts to another answer by features and differences of means, if --steer.dictionary is set",
    run=run_steer,
    results=SteerResults,
    groups=(ModelConfig, CorpusConfig, SteerConfig),
    reads=("baseline", "train"),
    follows=("ablate",),
    inputs=_inputs,
    names=_names,
    revision=7,  # fewer than 6 prompts are not steered
    processes="items",
    section=sections,
)

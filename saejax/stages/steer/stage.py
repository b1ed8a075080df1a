"""The stage ``steer``."""

from collections.abc import Sequence
from typing import Any

from saejax.config import Configs, counted
from saejax.dictionaries.names import folder_name
from saejax.interventions.settings import SteerConfig
from saejax.interventions.steering import SteerResults
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, list_folders, train_units
from saejax.stages import identities
from saejax.stages.steer.report import sections
from saejax.stages.steer.run import run_steer
from saejax.tasks.settings import CorpusConfig, TaskConfig, held_out_settings


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


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    read = counted(configs[ModelConfig], configs[SteerConfig])
    return read | held_out_settings(configs[CorpusConfig])


STEER = Stage(
    name="steer",
    summary="steers prompts to another answer by features and differences of means, if --steer.dictionary is set",
    run=run_steer,
    results=SteerResults,
    groups=(ModelConfig, CorpusConfig, SteerConfig),
    reads=("baseline", "train"),
    follows=("ablate",),
    settings=_settings,
    inputs=_inputs,
    names=_names,
    places=list_folders("steer", "dictionary"),
    revision=9,  # random lists of more than a tenth of the features that fire are no controls
    processes="items",
    section=sections,
)

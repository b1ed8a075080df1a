"""The stage ``steer``."""

from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Configs
from saejax.runner.stage import Stage, folder_name, train_units
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, MeshConfig, ModelConfig, SteerConfig, TaskConfig
from saejax.tasks import identities


def _names(configs: Configs) -> Sequence[str]:
    dictionary = configs[SteerConfig].dictionary
    return (folder_name(dictionary),) if dictionary and configs[TaskConfig].has_behaviours else ()


def _run(run: Run) -> Any:
    from saejax.interventions.steering import run_steer

    return run_steer(run)


def _results() -> Any:
    from saejax.interventions.steering import SteerResults

    return SteerResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.interventions.steer_report import sections

    return sections(findings, draw)


STEER = Stage(
    name="steer",
    summary="steers prompts to another answer by features and differences of means, if --steer.dictionary is set",
    run=_run,
    results=_results,
    groups=(ModelConfig, CorpusConfig, SteerConfig),
    placement=(MeshConfig, TaskConfig),
    reads=("baseline", "train"),
    follows=("ablate",),
    needs=lambda configs, name: ("baseline", *train_units(configs[SteerConfig].dictionary)),
    names=_names,
    identity=dict(
        model=identities.model,
        corpus=identities.corpus,
        dictionary=lambda configs: identities.dictionary(configs, "steer"),
    ),
    revision=3,
    processes="items",
    section=_sections,
)

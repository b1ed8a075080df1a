"""The stage ``steer``."""

from collections.abc import Sequence

from saejax.config import Configs
from saejax.dictionaries.names import folder_name
from saejax.interventions.settings import SteerConfig
from saejax.interventions.steering import SteerResults
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage, train_units
from saejax.stages import identities
from saejax.stages.steer.report import sections
from saejax.stages.steer.run import run_steer
from saejax.tasks.settings import CorpusConfig, TaskConfig


def _names(configs: Configs) -> Sequence[str]:
    dictionary = configs[SteerConfig].dictionary
    return (folder_name(dictionary),) if dictionary and configs[TaskConfig].has_behaviours else ()


STEER = Stage(
    name="steer",
    summary="steers prompts to another answer by features and differences of means, if --steer.dictionary is set",
    run=run_steer,
    results=SteerResults,
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
    section=sections,
)

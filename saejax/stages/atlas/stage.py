"""The stage ``atlas``."""

from saejax.config import Configs
from saejax.dictionaries.names import folder_name
from saejax.interpret.results import AtlasResults
from saejax.interventions.settings import AblateConfig
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages.atlas.labels import (
    check_label_files,
    hash_label_files,
    must_name_dictionaries,
    units_of_labels,
)
from saejax.stages.atlas.run import run_atlas
from saejax.stages.atlas.settings import AtlasConfig
from saejax.stages.interpret.report import links
from saejax.stages.interpret.stage import _names
from saejax.tasks.settings import TaskConfig


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    """Return what is shown: descriptions, labels by a language model and by people, and effects that were measured."""
    tested = configs[AblateConfig].dictionary
    measured = configs[TaskConfig].has_behaviours and tested.partition("/")[0] == name
    return inputs_of(
        configs,
        *units_of_labels(configs, name),
        *([f"ablate/{folder_name(tested)}"] if measured else []),
        labels=hash_label_files,
        several=must_name_dictionaries,
    )


ATLAS = Stage(
    name="atlas",
    summary="writes pages of all features that were interpreted, with labels by people (--atlas.labels)",
    revision=6,  # features without a label are named by three words
    run=run_atlas,
    results=AtlasResults,
    groups=(AtlasConfig,),
    reads=("interpret", "explain", "ablate"),
    inputs=_inputs,
    names=_names,
    check=check_label_files,
    section=links,
)

"""The stage ``attribute``."""

from collections.abc import Sequence

from saejax.attribution.results import AttributeResults
from saejax.attribution.settings import GraphConfig
from saejax.config import Configs
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages import identities
from saejax.stages.attribute import requests
from saejax.stages.attribute.report import sections
from saejax.stages.attribute.requests import unit_name
from saejax.stages.attribute.run import run_attribute


def _names(configs: Configs) -> Sequence[str]:
    """Return the unit of the graphs that are asked for; none if there are none."""
    name = unit_name(configs[GraphConfig])
    return (name,) if name else ()


def _check(configs: Configs) -> None:
    """Check the files of prompts, labels and groups before any model is loaded."""
    requests.check_files(configs[GraphConfig])


def _dictionaries(configs: Configs) -> str:
    """Return the identity of dictionaries and of the files of prompts and groups."""
    return requests.identity(configs[GraphConfig])


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    units = ("baseline",) if configs[GraphConfig].behaviours else ()
    return inputs_of(configs, *units, model=identities.model, graph=_dictionaries)


ATTRIBUTE = Stage(
    name="attribute",
    summary="traces prompts into attribution graphs, if --graph.prompt, prompts or behaviours is set",
    run=run_attribute,
    results=AttributeResults,
    groups=(ModelConfig, GraphConfig),
    reads=("baseline",),
    follows=("train", "ablate"),  # --graph.transcoders may name what this run trains
    inputs=_inputs,
    names=_names,
    revision=6,  # pins and places of a saved state are shown, searched contexts have parts of the range
    section=sections,
    processes="all",
    check=_check,
    places=lambda configs: requests.list_places(configs[GraphConfig]),
)

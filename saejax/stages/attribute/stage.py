"""The stage ``attribute``."""

from collections.abc import Sequence

from saejax.attribution.results import AttributeResults
from saejax.attribution.settings import GraphConfig
from saejax.config import Configs
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.stage import Stage
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
    """Check the file of prompts before any model is loaded."""
    if configs[GraphConfig].prompts:
        requests.read_requests(configs[GraphConfig])


def _dictionaries(configs: Configs) -> str:
    """Return the identity of dictionaries and of the files of prompts and groups."""
    return requests.identity(configs[GraphConfig])


ATTRIBUTE = Stage(
    name="attribute",
    summary="traces prompts into attribution graphs, if --graph.prompt, prompts or behaviours is set",
    run=run_attribute,
    results=AttributeResults,
    groups=(ModelConfig, GraphConfig),
    placement=(MeshConfig,),
    reads=("baseline",),
    follows=("train", "ablate"),  # --graph.transcoders may name what this run trains
    needs=lambda configs, name: ("baseline",) if configs[GraphConfig].behaviours else (),
    names=_names,
    identity=dict(model=identities.model, graph=_dictionaries),
    revision=5,  # names of graphs tell all prompts apart, weights of improbable targets do not vanish
    section=sections,
    processes="all",
    check=_check,
)

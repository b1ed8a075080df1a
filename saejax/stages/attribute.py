"""The stage ``attribute``."""

from collections.abc import Sequence

from saejax.runner.config import Configs
from saejax.runner.stage import Stage
from saejax.settings import GraphConfig, MeshConfig, ModelConfig
from saejax.tasks import identities


def _names(configs: Configs) -> Sequence[str]:
    """The unit of the graphs that are asked for."""
    from saejax.attribution.requests import unit_name

    name = unit_name(configs[GraphConfig])
    return (name,) if name else ()


def _dictionaries(configs: Configs) -> str:
    """The dictionaries, and the files of prompts and groups."""
    from saejax.attribution import requests

    return requests.identity(configs[GraphConfig])


ATTRIBUTE = Stage(
    name="attribute",
    summary="traces prompts into attribution graphs, if --graph.prompt, token_ids, prompts or behaviours is set",
    run="saejax.attribution.run:run_attribute",
    results="saejax.attribution.results:AttributeResults",
    groups=(ModelConfig, GraphConfig),
    placement=(MeshConfig,),
    reads=("baseline",),
    follows=("train", "ablate"),  # --graph.transcoders may name what this run trains
    needs=lambda configs, name: ("baseline",) if configs[GraphConfig].behaviours else (),
    names=_names,
    identity=dict(model=identities.model, graph=_dictionaries),
    programs="saejax.attribution.programs:attribute_programs",
    section="saejax.attribution.report:sections",
    processes="all",
)

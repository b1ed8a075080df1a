"""The stage ``attribute``."""

from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Configs
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import GraphConfig, MeshConfig, ModelConfig
from saejax.tasks import identities


def _names(configs: Configs) -> Sequence[str]:
    """Return the unit of the graphs that are asked for; none if there are none."""
    from saejax.attribution.requests import unit_name

    name = unit_name(configs[GraphConfig])
    return (name,) if name else ()


def _dictionaries(configs: Configs) -> str:
    """Return the identity of dictionaries and of the files of prompts and groups."""
    from saejax.attribution import requests

    return requests.identity(configs[GraphConfig])


def _run(run: Run) -> Any:
    from saejax.attribution.run import run_attribute

    return run_attribute(run)


def _results() -> Any:
    from saejax.attribution.results import AttributeResults

    return AttributeResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.attribution.report import sections

    return sections(findings, draw)


ATTRIBUTE = Stage(
    name="attribute",
    summary="traces prompts into attribution graphs, if --graph.prompt, prompts or behaviours is set",
    run=_run,
    results=_results,
    groups=(ModelConfig, GraphConfig),
    placement=(MeshConfig,),
    reads=("baseline",),
    follows=("train", "ablate"),  # --graph.transcoders may name what this run trains
    needs=lambda configs, name: ("baseline",) if configs[GraphConfig].behaviours else (),
    names=_names,
    identity=dict(model=identities.model, graph=_dictionaries),
    revision=4,  # features without a description are searched in texts
    section=_sections,
    processes="all",
)

"""The stage ``circuits``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage
from saejax.runner.workspace import Run
from saejax.settings import GraphConfig, MeshConfig, ModelConfig, shared
from saejax.tasks import identities

_READ = ("transcoders", "l0", "max_features", "labels", "features")
_UNREAD = [f"graph.{field.name}" for field in dataclasses.fields(GraphConfig) if field.name not in _READ]


@dataclasses.dataclass(frozen=True)
class CircuitsConfig(Config):
    """Circuits of behaviours, with the transcoders of --graph.transcoders."""

    behaviours: tuple[str, ...] = setting((), "behaviours whose circuits are found; empty: none")
    traced: int = setting(10, "number of train prompts of each behaviour that are traced, to select features", low=1)
    measured: int = setting(20, "maximum number of test prompts of each behaviour on which effects are measured", low=2)
    groups: str = setting(
        "",
        'file of groups to measure in place of proposed ones, .json: {"two_hop": [["places", "3_17_content", '
        '"12_208_last"]]}, features as layer_index_role with a role of content, context or last',
        changes_results=False,  # what is in it counts
    )
    bootstrap: int = shared.causal_bootstrap()
    seed: int = shared.causal_seed()


def _files(configs: Configs) -> str:
    """Return the identity of the transcoders, labels and groups."""
    from saejax.attribution import requests
    from saejax.files import file_sha256

    path = Path(configs[CircuitsConfig].groups)
    graph = dataclasses.replace(configs[GraphConfig], prompts="", supernodes="")
    return requests.identity(graph) + (file_sha256(path) if path.is_file() else "")


def check(configs: Configs) -> None:
    """Raise a ``UserError`` unless transcoders are named, and the file of groups exists."""
    if configs[CircuitsConfig].behaviours and not configs[GraphConfig].transcoders:
        raise UserError("--circuits.behaviours takes transcoders of all layers: name a set in --graph.transcoders")
    groups = configs[CircuitsConfig].groups
    if groups and not Path(groups).is_file():
        raise UserError(f"--circuits.groups={groups} cannot be read: name a .json file of groups")


def _run(run: Run) -> Any:
    from saejax.circuits.run import run_circuits

    return run_circuits(run)


def _results() -> Any:
    from saejax.circuits.results import CircuitsResults

    return CircuitsResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.circuits.report import sections

    return sections(findings, draw)


CIRCUITS = Stage(
    name="circuits",
    summary="groups features that return over a behaviour's prompts and measures what each group does, if "
    "--circuits.behaviours is set",
    revision=7,  # placebo targets are no answers in another spelling
    run=_run,
    results=_results,
    groups=(ModelConfig, GraphConfig, CircuitsConfig),
    placement=(MeshConfig,),
    reads=("baseline",),
    follows=("train", "ablate", "attribute"),  # --graph.transcoders may name what this run trains
    needs=lambda configs, name: ("baseline",),
    names=lambda configs: ("",) if configs[CircuitsConfig].behaviours else (),
    identity=dict(model=identities.model, graph=_files),
    check=check,
    section=_sections,
    unread=lambda configs, name: _UNREAD,
    processes="all",
)

"""The stage ``circuits``."""

import dataclasses
from pathlib import Path

from saejax.attribution.settings import GraphConfig
from saejax.circuits.groups import read_groups
from saejax.circuits.results import CircuitsResults
from saejax.config import Configs
from saejax.errors import UserError
from saejax.models.identity import content_sha256
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Stage, inputs_of, settings_of
from saejax.stages import identities
from saejax.stages.attribute import requests
from saejax.stages.circuits.report import sections
from saejax.stages.circuits.run import run_circuits
from saejax.stages.circuits.settings import CircuitsConfig

_READ = ("transcoders", "l0", "max_features", "labels", "features")
_UNREAD = [f"graph.{field.name}" for field in dataclasses.fields(GraphConfig) if field.name not in _READ]


def _files(configs: Configs) -> str:
    """Return the identity of the transcoders, labels and groups."""
    path = Path(configs[CircuitsConfig].groups)
    graph = dataclasses.replace(configs[GraphConfig], prompts="", supernodes="", lens="")
    return requests.identity(graph) + (content_sha256(path) if path.is_file() else "")


def check(configs: Configs) -> None:
    """Raise a ``UserError`` unless transcoders are named, and the files of groups and labels hold such."""
    if configs[CircuitsConfig].behaviours and not configs[GraphConfig].transcoders:
        raise UserError("--circuits.behaviours takes transcoders of all layers: name a set in --graph.transcoders")
    groups = configs[CircuitsConfig].groups
    if groups and not Path(groups).is_file():
        raise UserError(f"--circuits.groups={groups} cannot be read: name a .json file of groups")
    read_groups(groups, configs[CircuitsConfig].behaviours)
    requests.check_labels(configs[GraphConfig])


def _places(configs: Configs) -> dict[str, list[str]]:
    """Return the files and folders of --graph that circuits read."""
    places = requests.list_places(configs[GraphConfig])
    return {setting: some for setting, some in places.items() if setting not in _UNREAD}


CIRCUITS = Stage(
    name="circuits",
    summary="groups features that return over a behaviour's prompts and measures what each group does, if "
    "--circuits.behaviours is set",
    revision=14,  # claims about shared features are held to chance
    run=run_circuits,
    results=CircuitsResults,
    groups=(ModelConfig, GraphConfig, CircuitsConfig),
    reads=("baseline",),
    follows=("train", "ablate", "attribute"),  # --graph.transcoders may name what this run trains
    settings=settings_of(ModelConfig, GraphConfig, CircuitsConfig, but=_UNREAD),
    inputs=lambda configs, name: inputs_of(configs, "baseline", model=identities.model, graph=_files),
    names=lambda configs: ("",) if configs[CircuitsConfig].behaviours else (),
    check=check,
    places=_places,
    section=sections,
    processes="all",
)

"""Traces that earlier units hold, so that settings of what is shown do not trace again.

A whole graph is saved with a key of what its numbers depend on: model, dictionaries, prompt, targets and the settings
of the trace. A unit that wants the same trace takes it, whatever it prunes, names and draws.
"""

import shutil
from pathlib import Path

from saejax.attribution.forms.features import FEATURES
from saejax.attribution.graph import Graph
from saejax.attribution.settings import GraphConfig
from saejax.config import Configs, counted
from saejax.errors import UserError
from saejax.files import fingerprint, read_json, write_json
from saejax.models.settings import ModelConfig
from saejax.runner.workspace import Run
from saejax.stages import identities
from saejax.stages.attribute.requests import Request, set_identity

_REVISION = 1  # of the numbers of a trace; one more where the code changes them
_KEY = "trace.json"  # beside a whole graph: its key, and the seconds that tracing took
_SEARCHED = "searched.json"  # of a unit: the features that were searched, in how many texts, by which revision
_SEARCH_REVISION = 2  # of what a search finds; one more where the code changes it


def trace_key(configs: Configs, request: Request) -> str:
    """Return a fingerprint of all that the numbers of a request's graph depend on."""
    config = configs[GraphConfig]
    names = ("chat_template", "max_logits", "max_features", "estimate", "direct")
    settings = [getattr(config, name) for name in names]
    model = identities.model(configs), counted(configs[ModelConfig])
    return fingerprint(
        [_REVISION, model, set_identity(config), settings, request.prompt, request.targets, request.answers]
    )


def find_trace(run: Run, request: Request) -> Path | None:
    """Return the folder of a request's whole graph in this unit or another of its workdir; None: there is none."""
    key = trace_key(run.configs, request)
    for path in sorted(run.folder.parent.glob(f"*/*-graph/{_KEY}")):
        try:
            if read_json(path)["key"] == key:
                Graph.load(path.parent)
                return path.parent.resolve()  # behind the link to the current unit
        except (UserError, KeyError, TypeError):  # damaged: it is traced again
            continue
    return None


def read_trace(folder: Path) -> tuple[Graph, float]:
    """Return a whole graph that was saved, and the seconds that tracing it took."""
    return Graph.load(folder), float(read_json(folder / _KEY)["seconds"])


def write_trace(folder: Path, graph: Graph, key: str, seconds: float) -> None:
    """Save a whole graph with its key, in place of another one that is there."""
    if (folder / _KEY).exists() and read_json(folder / _KEY) == dict(key=key, seconds=seconds):
        return
    shutil.rmtree(folder, ignore_errors=True)
    graph.save(folder)
    write_json(folder / _KEY, dict(key=key, seconds=seconds))  # last: the graph is complete


def copy_contexts(run: Run, unit: Path | None) -> None:
    """Copy the contexts that an earlier unit searched in as many texts."""
    wanted = dict(texts=run.configs[GraphConfig].contexts, revision=_SEARCH_REVISION)
    if unit and unit != run.folder.resolve() and wanted.items() <= _searched(unit).items():
        shutil.copytree(unit / FEATURES, run.folder / FEATURES, dirs_exist_ok=True)
        add_searched(run, {(layer, index) for layer, index in _searched(unit)["features"]})


def searched_features(run: Run) -> set[tuple[int, int]]:
    """Return the features of this unit that were searched, also features that fire nowhere."""
    return {(layer, index) for layer, index in _searched(run.folder).get("features", [])}


def add_searched(run: Run, features: set[tuple[int, int]]) -> None:
    """Note that features were searched."""
    texts, done = run.configs[GraphConfig].contexts, searched_features(run) | features
    write_json(run.folder / _SEARCHED, dict(texts=texts, revision=_SEARCH_REVISION, features=sorted(done)))


def _searched(unit: Path) -> dict:
    return read_json(unit / _SEARCHED) if (unit / _SEARCHED).exists() else {}

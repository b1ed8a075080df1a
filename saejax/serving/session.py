"""``ModelSession``: one model with its dictionaries in memory, and the prompts that were run last.

Both are loaded when they are first needed. What a graph was made with stands in its unit's summary, unless the command
line names a model and a set for all. What is kept of a graph is keyed by its document's hash, the model and the set: a
graph that is traced again under its slug is another graph.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax import config as configuration
from saejax.attribution.forms.document import GraphDocument, feature_nodes, feature_of
from saejax.attribution.forms.neuronpedia import to_document
from saejax.attribution.graph.data import LOGIT
from saejax.attribution.local.dictionaries import LayerSaes
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.rows import Target
from saejax.attribution.local.state import PromptRun
from saejax.attribution.settings import GraphConfig
from saejax.attribution.trace.gradient import SaeRun
from saejax.config import Configs, group_name
from saejax.errors import UserError
from saejax.models.settings import ModelConfig
from saejax.parallel.settings import MeshConfig
from saejax.runner.pipeline import run_stages
from saejax.runner.results import load_summary
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import STARTED, SUMMARY, Run, Workspace
from saejax.serving.jobs import Job
from saejax.serving.store import GraphStore, StoredGraph
from saejax.stages.attribute.requests import Request, read_labels, unit_name
from saejax.stages.attribute.run import open_parts, run_attribute, trace_request

Key = tuple[str, Any]  # hash of a graph's document; model and set
_KEPT = 2  # prompts that stay in memory
_SAME = 0.9  # share of a graph's features that must be active when its prompt is run again
# The reader's prompt alone.
_OTHERWISE: dict[str, Any] = dict(prompts="", behaviours=(), supernodes="", slug="", query_key=())


class ModelSession:
    """A model, its dictionaries, and prompts.

    Args:
      configs: every group of configuration, of the command line.
      named: whether the command line names a set of dictionaries, which then goes for all graphs.

    Attributes:
      defaults: every group of configuration, of the command line.
    """

    def __init__(self, configs: Configs, named: bool):
        self.defaults, self._named = configs, named
        self._parts: tuple[Any, Any] | None = None  # what they are of, and the model and its dictionaries
        self._runs: dict[Key, LocalModel | SaeRun] = {}

    def configs_of(self, graph: StoredGraph | None) -> Configs:
        """Return the configuration that a graph was made with; of None, the command line's.

        Raises:
          UserError: nothing says with which model and dictionaries it was made.
        """
        if self._named:
            return self.defaults
        if graph is None or graph.unit is None:
            what = (
                "nothing names" if graph is None else f"{graph.id} was not made by experiments.attribute, which names"
            )
            raise UserError(f"{what} its model and transcoders: start with --model.path=MODEL --graph.transcoders=SET")
        saved, groups, path = load_summary(graph.unit).config, (ModelConfig, GraphConfig), graph.unit / SUMMARY
        if missing := [group_name(of) for of in groups if group_name(of) not in saved]:
            raise UserError(f"{path} lacks the settings of {', '.join(missing)}: trace the prompt again")
        model, graph_config = (
            configuration.from_json(of, saved[group_name(of)], path, f"config.{group_name(of)}") for of in groups
        )
        return self.defaults | model | graph_config

    def graph_config(self, graph: StoredGraph) -> GraphConfig:
        """Return the settings that a graph was made with; where nothing says so, the command line's."""
        try:
            return self.configs_of(graph)[GraphConfig]
        except UserError:
            return self.defaults[GraphConfig]

    def opened(self, run: Run, job: Job) -> tuple[Any, Any]:
        """Return what ``run.open_parts`` does, from memory where the last call was for the same."""
        key = _parts_key(run.configs)
        if self._parts is None or self._parts[0] != key:
            # Before the next one is loaded: both would take memory.
            self._parts = None
            self._runs.clear()
            job.say("Loading the model")
            self._parts = key, open_parts(run)
            job.say("The model is loaded")  # stops here if the work was cancelled meanwhile
        return self._parts[1]

    def run(self, graph: StoredGraph, document: GraphDocument, job: Job) -> LocalModel | SaeRun:
        """Return the model that was run on a graph's prompt, with what its set makes of it.

        Raises:
          UserError: its model and set do not make its features.
        """
        key = self._key(graph)
        if key not in self._runs:
            unit = Run("attribute", "", graph.path.parent, self.configs_of(graph), {})
            model, dictionaries = self.opened(unit, job)
            job.say("Running the prompt")
            ids_P, is_saes = np.array(token_ids(document), np.int32), isinstance(dictionaries, LayerSaes)
            run = SaeRun.of(model, dictionaries, ids_P) if is_saes else LocalModel(model, dictionaries, ids_P)
            _check_same(document, run)
            self.keep(graph, run)
        return self._runs[key]

    def keep(self, graph: StoredGraph, run: LocalModel | SaeRun) -> None:
        """Keep the run of a graph's prompt, and forget the oldest."""
        self._runs[self._key(graph)] = run
        while len(self._runs) > _KEPT:
            del self._runs[next(iter(self._runs))]

    def prune(
        self, graph: StoredGraph, document: GraphDocument, nodes: float, edges: float, outputs: Sequence[str] = ()
    ) -> GraphDocument:
        """Return a graph pruned with other thresholds, from the whole one.

        Args:
          graph: the graph.
          document: the graph as it was saved, whose labels, groups, pins and their places stay.
          nodes: share of the influence of nodes, 0 to 1.
          edges: share of the influence of edges, 0 to 1.
          outputs: ids of two logits, whose difference is explained in place of all; none: all are.

        Raises:
          UserError: the whole graph is not saved or is damaged, or has no such logits.
        """
        config, whole = self.graph_config(graph), graph.load_whole()
        if outputs:
            labels = dict(zip(whole.ids[whole.slice_of(LOGIT)], whole.labels, strict=True))
            whole = whole.difference(*(labels.get(name, name) for name in outputs))
        pruned = whole.prune(nodes, edges, config.top_edges, config.min_weight)
        document_labels = {feature_of(node): node["clerp"] for node in feature_nodes(document) if node["clerp"]}
        changed = to_document(
            dataclasses.replace(pruned, prompt=document["metadata"]["prompt"]),
            document["metadata"]["slug"],
            scan=document["metadata"]["scan"],
            source_set=config.source_set,
            labels=read_labels(config) | document_labels,
        )
        return {**changed, "qParams": document["qParams"]}  # also of nodes that are pruned away, which the page counts

    def _key(self, graph: StoredGraph) -> Key:
        return graph.fingerprint, _parts_key(self.configs_of(graph))


def token_ids(document: GraphDocument) -> list[int]:
    """Return the prompt's token ids, from the ids of a graph's token nodes.

    Raises:
      UserError: a token has no node.
    """
    id_at = {}
    for node in document["nodes"]:
        parts = re.fullmatch(r"E_(\d+)_(\d+)", node["node_id"])
        if parts:
            id_at[int(parts[2])] = int(parts[1])
    if sorted(id_at) != list(range(len(document["metadata"]["prompt_tokens"]))):
        raise UserError("the graph does not name all tokens of its prompt, so its prompt cannot be run again")
    return [id_at[position] for position in sorted(id_at)]


def targets_of(document: GraphDocument) -> list[Target]:
    """Return the targets of a graph: ids of tokens, and pairs of ids for logit differences.

    Documents of other programs do not name them; their graphs explain the tokens of the logits.
    """
    settings = document["metadata"].get("generation_settings") or {}
    logits = [node["node_id"] for node in document["nodes"] if node["feature_type"] == "logit"]
    try:
        pairs = settings.get("targets") or [(int(name.split("_")[1]), -1) for name in logits]
        named = [(int(first), int(second)) for first, second in pairs if first >= 0]  # not directions
        return [pair if pair[1] >= 0 else pair[0] for pair in named]
    except (TypeError, ValueError, IndexError):
        raise UserError("the graph does not name the tokens that it explains") from None


def _parts_key(configs: Configs) -> Any:
    """Return what decides which model and dictionaries are opened."""
    graph = configs[GraphConfig]
    of_saes = graph.dictionaries, graph.estimate, graph.direct
    return configs[ModelConfig], configs[MeshConfig], graph.transcoders, graph.l0, of_saes


def _check_same(document: GraphDocument, run: PromptRun) -> None:
    """Raise ``UserError`` if too few of a graph's features are active in a run with this model and set."""
    features = [(*feature_of(node), node["ctx_idx"]) for node in feature_nodes(document)]
    still_active = sum((layer, position, feature) in run.active.index_of for layer, feature, position in features)
    if still_active < _SAME * len(features):
        raise UserError(
            f"of the graph's {len(features)} features {still_active} are active when {run.model.source.name} runs its "
            f"prompt with {run.dictionaries.name}: are these the model and the set that it was made with?"
        )


def trace_typed(
    session: ModelSession, configs: Configs, store: GraphStore, settings: Mapping[str, Any], job: Job
) -> str:
    """Trace a prompt into its workdir's ``attribute/``, and keep it in memory.

    Args:
      session: the model and its cached graphs.
      configs: configuration of the model and the dictionaries.
      store: the graphs of the workdir.
      settings: fields of ``GraphConfig``, ``prompt`` among them.
      job: receives the progress.

    Returns:
      The graph's id; the existing graph's id if the same one was traced before.

    Raises:
      UserError: the prompt cannot be traced, or another process works in the workdir.
      Interrupted: it was stopped; its unfinished files are removed.
    """
    root = store.root
    configs |= dataclasses.replace(configs[GraphConfig], **_OTHERWISE, **settings)
    configs, slug, folder = _with_free_slug(configs, root)
    traced: list[Any] = []
    claimed: list[Any] = []  # runs of this request: only what they began may be discarded

    def trace(model: Any, dictionaries: Any, request: Request, config: GraphConfig) -> Any:
        job.say("Tracing")
        traced.append(trace_request(model, dictionaries, request, config, job.progress))
        job.say("Pruning and writing")
        return traced[-1]

    def substitute(run: Any) -> Any:
        claimed.append(run)
        return run_attribute(run, lambda of: session.opened(of, job), trace)

    try:
        run_stages(["attribute"], configs, str(root), job.say, job.stopping, substitutes=dict(attribute=substitute))
    finally:
        if claimed and (folder / STARTED).exists() and not (folder / SUMMARY).exists():
            workspace, unit = Workspace(root), f"attribute/{slug}"
            workspace.discard(unit, folder.name.rpartition("-")[2])
    graph = f"attribute/{slug}/graphs/{slug}"
    if traced:
        session.keep(store.find(graph), traced[0].local)
    return graph


def _with_free_slug(configs: Configs, root: Path) -> tuple[Configs, str, Path]:
    """Return settings with the first slug of NAME, NAME-2, ... that is free or has these settings, and its folder."""
    workspace, name, number = Workspace(root), unit_name(configs[GraphConfig]), 1
    while True:
        slug = name if number == 1 else f"{name}-{number}"
        slug_configs = configs | dataclasses.replace(configs[GraphConfig], slug=slug)
        folder = workspace.folder(f"attribute/{slug}", Workplan(slug_configs).fingerprint(f"attribute/{slug}"))
        if workspace.current(f"attribute/{slug}") in (None, folder):
            return slug_configs, slug, folder
        number += 1

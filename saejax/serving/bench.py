"""What the server has in memory: one model with its dictionaries, and the prompts that were run last.

Both are loaded when they are first needed. What a graph was made with stands in its unit's summary, unless the command
line names a model and a set for all.
"""

import ast
import dataclasses
import re
from collections import OrderedDict
from typing import Any

import numpy as np

from saejax.attribution.forms.document import DocumentNode, GraphDocument
from saejax.attribution.forms.neuronpedia import to_document
from saejax.attribution.graph import Graph
from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.local.saes import LayerSaes
from saejax.attribution.requests import Request, TargetText, read_labels
from saejax.attribution.run import open_parts, trace_request
from saejax.attribution.trace.prompt import Traced
from saejax.attribution.trace.sae_run import SaeRun
from saejax.errors import UserError
from saejax.results import load_summary
from saejax.runner import config as configuration
from saejax.runner.config import Configs, group_name
from saejax.runner.workspace import Run
from saejax.serving.jobs import Job
from saejax.serving.shelf import ShelvedGraph
from saejax.settings import GraphConfig, MeshConfig, ModelConfig

_KEPT = 2  # prompts, and pruned graphs, that stay in memory
_SAME = 0.9  # share of a graph's features that must be active when its prompt is run again
_DIFFERENCE = re.compile(r"^Output \"((?:'|\").*(?:'|\")) - ((?:'|\").*(?:'|\"))\" \(p=[\d.e+-]+\)$", re.DOTALL)


class Bench:
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
        self._runs: OrderedDict[str, Replacement | SaeRun] = OrderedDict()
        self._graphs: OrderedDict[str, Graph] = OrderedDict()  # whole ones
        self._pruned: OrderedDict[tuple[str, float, float], GraphDocument] = OrderedDict()

    def configs_of(self, graph: ShelvedGraph | None) -> Configs:
        """The configuration that a graph was made with; None: that of the command line.

        Raises:
          UserError: nothing says with which model and dictionaries it was made.
        """
        if self._named:
            return self.defaults
        if graph is None or graph.unit is None:
            told = (
                "nothing names" if graph is None else f"{graph.id} was not made by experiments.attribute, which names"
            )
            raise UserError(f"{told} its model and transcoders: start with --model.path=MODEL --graph.transcoders=SET")
        saved = load_summary(graph.unit).config
        model, graph_config = (configuration.from_json(of, saved[group_name(of)]) for of in (ModelConfig, GraphConfig))
        return self.defaults | model | graph_config

    def opened(self, run: Run, job: Job) -> tuple[Any, Any]:
        """``run.open_parts``, from memory where the last call was for the same."""
        of = run.configs[GraphConfig]
        names = of.transcoders, of.revision, of.subfolder, of.l0, of.dictionaries
        key = run.configs[ModelConfig], run.configs[MeshConfig], names
        if self._parts is None or self._parts[0] != key:
            self.forget()
            job.say("Loading the model")
            self._parts = key, open_parts(run)
        return self._parts[1]

    def forget(self) -> None:
        """Frees all memory."""
        self._parts = None
        self._runs.clear()
        self._graphs.clear()

    def run(self, graph: ShelvedGraph, document: GraphDocument, job: Job) -> Replacement | SaeRun:
        """The model that was run on a graph's prompt, with what its set makes of it.

        Raises:
          UserError: its model and set do not make its features.
        """
        if graph.id not in self._runs:
            model, dictionaries = self.opened(self._run_of(graph), job)
            job.say("Running the prompt")
            kind: Any = SaeRun if isinstance(dictionaries, LayerSaes) else Replacement
            run = kind.of(model, dictionaries, np.array(token_ids(document), np.int32))
            _check_same(document, run)
            _keep(self._runs, graph.id, run)
        return self._runs[graph.id]

    def whole(self, graph: ShelvedGraph) -> bool:
        """Whether the whole graph is in memory."""
        return graph.id in self._graphs

    def keep(self, graph: str, traced: Any) -> None:
        """Keeps what was traced under a graph's id."""
        _keep(self._runs, graph, traced.replacement if isinstance(traced, Traced) else traced.run)
        _keep(self._graphs, graph, traced.graph)

    def prune(self, graph: ShelvedGraph, document: GraphDocument, nodes: float, edges: float, job: Job) -> None:
        """Prunes the whole graph, which is traced again if it is not in memory; ``pruned`` has what comes of it.

        Raises:
          UserError: the prompt cannot be traced again, or nothing is left.
        """
        run = self._run_of(graph)
        config = run.configs[GraphConfig]
        if not self.whole(graph):
            model, dictionaries = self.opened(run, job)
            job.say("Tracing the prompt again")
            self.keep(
                graph.id, trace_request(model, dictionaries, *_request(document, config), on_progress=job.progress)
            )
        job.say("Pruning")
        whole = dataclasses.replace(self._graphs[graph.id], prompt=document["metadata"]["prompt"])
        pruned = whole.prune(nodes, edges, config.top_edges)
        known = {_feature(node): node["clerp"] for node in _features(document) if node["clerp"]}
        ids, params = set(pruned.ids), document["qParams"]
        groups = [[label, *(one for one in members if one in ids)] for label, *members in params.get("supernodes", [])]
        made = to_document(
            pruned,
            document["metadata"]["slug"],
            scan=document["metadata"]["scan"],
            source_set=config.source_set,
            labels=read_labels(config) | known,
            supernodes=[group for group in groups if len(group) > 1],
            pinned=[one for one in params.get("pinnedIds", []) if one in ids],
        )
        _keep(self._pruned, (graph.id, nodes, edges), made)

    def has_feature(self, graph: ShelvedGraph, node: str) -> bool:
        """Whether the node of an id is a feature of a graph that was pruned here, which may have others."""
        pruned = [document for key, document in list(self._pruned.items()) if key[0] == graph.id]
        return any(one["node_id"] == node for document in pruned for one in _features(document))

    def pruned(self, graph: ShelvedGraph, nodes: float, edges: float) -> GraphDocument | None:
        """What ``prune`` made, if it is still in memory."""
        return self._pruned.get((graph.id, nodes, edges))

    def _run_of(self, graph: ShelvedGraph) -> Run:
        return Run("attribute", "", graph.path.parent, self.configs_of(graph), {})


def token_ids(document: GraphDocument) -> list[int]:
    """The prompt's token ids, which the ids of a graph's tokens hold.

    Raises:
      UserError: a token has no node.
    """
    found = {}
    for node in document["nodes"]:
        parts = re.fullmatch(r"E_(\d+)_(\d+)", node["node_id"])
        if parts:
            found[int(parts[2])] = int(parts[1])
    if sorted(found) != list(range(len(document["metadata"]["prompt_tokens"]))):
        raise UserError("the graph does not name all tokens of its prompt, which cannot be run again therefore")
    return [found[position] for position in sorted(found)]


def targets_of(document: GraphDocument) -> list[TargetText]:
    """What a graph explains: ids of tokens, and pairs of texts for differences.

    Raises:
      UserError: it explains another direction.
    """
    found: list[TargetText] = []
    for node in document["nodes"]:
        if node["feature_type"] == "logit":
            token = node["node_id"].split("_")[1]
            pair = _DIFFERENCE.match(node["clerp"])
            if token.isdecimal() and not pair:
                found.append(int(token))
            elif pair:
                found.append((ast.literal_eval(pair[1]), ast.literal_eval(pair[2])))
            else:
                raise UserError(f"the graph explains {node['clerp'] or 'a direction'}, which is no token to trace")
    return found


def _request(document: GraphDocument, config: GraphConfig) -> tuple[Request, GraphConfig]:
    """What traces a graph's prompt again."""
    metadata = document["metadata"]
    most = (metadata.get("generation_settings") or {}).get("max_feature_nodes") or 0
    request = Request(metadata["slug"], tuple(token_ids(document)), tuple(targets_of(document)))
    return request, dataclasses.replace(config, max_features=int(most))


def _check_same(document: GraphDocument, run: PromptRun) -> None:
    """Refuses a model or set that is not the graph's."""
    own = [(*_feature(node), node["ctx_idx"]) for node in _features(document)]
    again = sum((layer, position, feature) in run.active.place_of for layer, feature, position in own)
    if again < _SAME * len(own):
        raise UserError(
            f"of the graph's {len(own)} features {again} are active when {run.model.source.name} runs its "
            f"prompt with {run.dictionaries.name}: are these the model and the set that it was made with?"
        )


def _features(document: GraphDocument) -> list[DocumentNode]:
    return [node for node in document["nodes"] if node["feature_type"] == "cross layer transcoder"]


def _feature(node: DocumentNode) -> tuple[int, int]:
    layer, feature = node["node_id"].split("_")[:2]
    return int(layer), int(feature)


def _keep(kept: OrderedDict, key: Any, value: Any) -> None:
    """Keeps a value as the newest, and forgets the oldest."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)

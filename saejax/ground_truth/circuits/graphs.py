"""Attribution graphs of a transformer set by hand, compared with its known edges."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import FEATURE, LOGIT, TOKEN
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.prompt import trace
from saejax.ground_truth.circuits.edges import (
    NOTHING,
    Edges,
    Node,
    aligned,
    circuit,
    known_edges,
    possible,
    renamed,
    shares,
)
from saejax.ground_truth.circuits.handset import HandSet
from saejax.ground_truth.circuits.results import EdgeScores
from saejax.ground_truth.run import over_seeds
from saejax.models.language_model import LanguageModel
from saejax.tasks.behaviours import Prompt

SHARE = 0.01  # of a target's largest edge; smaller edges are in no circuit
_UNMATCHED = 1 << 20  # added to the index of a feature that matches no neuron


def graph_edges(graph: Graph) -> Edges:
    """Return a graph's edges between words, features and the logit; nodes have the indices of features."""
    nodes, silent_N = graph.nodes, np.zeros(len(graph.nodes.kind_N), bool)
    for layer in range(graph.n_layers):  # the same rule as in known_edges, layer by layer
        own_N = (nodes.kind_N == FEATURE) & (nodes.layer_N == layer)
        silent_N |= own_N & (nodes.value_N <= NOTHING * nodes.value_N[own_N].max(initial=0.0))
    kept_N = np.isin(nodes.kind_N, (FEATURE, TOKEN)) & ~silent_N
    names: list[Node] = [
        (layer if kind != LOGIT else graph.n_layers, position, index if kind == FEATURE else -1)
        for kind, layer, position, index in zip(
            *(column.tolist() for column in (nodes.kind_N, nodes.layer_N, nodes.position_N, nodes.index_N)), strict=True
        )
    ]
    sources = np.flatnonzero(kept_N)
    kept_R = np.flatnonzero(~silent_N[graph.target_R])
    targets = graph.target_R[kept_R]
    # In float64, as the known weights are.
    weight_SxR = graph.adjacency_RxS[np.ix_(kept_R, sources)].T.astype(np.float64)
    return Edges(tuple(names[node] for node in sources), tuple(names[node] for node in targets), weight_SxR)


def judge_edges(
    model: LanguageModel,
    transcoders: LayerTranscoders,
    spec: HandSet,
    prompts: Sequence[Prompt],
    neuron_of: Mapping[tuple[int, int], int],
) -> EdgeScores:
    """Trace prompts and compare their graphs with the known edges.

    Args:
      model: the transformer.
      transcoders: transcoders of all its layers.
      spec: its description.
      prompts: prompts whose correct minus wrong answer is traced.
      neuron_of: (layer, feature) -> the neuron that it matches; other features match none.
    """

    def named(node: Node) -> Node:
        layer, position, index = node
        return (layer, position, neuron_of.get((layer, index), _UNMATCHED + index)) if index >= 0 else node

    rows = []
    for prompt in prompts:
        answers = model.token_id(prompt.correct), model.token_id(prompt.wrong)
        graph = trace(model, transcoders, prompt.text, targets=[answers])
        traced = renamed(graph_edges(graph), named)
        truth = known_edges(spec, prompt.text, prompt.correct.strip(), prompt.wrong.strip())
        rows.append((*_scores(traced, truth), graph.scores().replacement))
    columns = [over_seeds(column) for column in list(zip(*rows, strict=True))[1:]]
    # The largest error of all prompts: an exact graph must be exact on each.
    return EdgeScores(len(prompts), max(row[0] for row in rows), *columns)


def _scores(traced: Edges, truth: Edges) -> tuple[float, float, float, float]:
    """Return error, AUROC, precision and recall of one graph."""
    every = (dict.fromkeys([*getattr(truth, side), *getattr(traced, side)]) for side in ("sources", "targets"))
    sources, targets = map(tuple, every)
    weight_NxM = aligned(truth, sources, targets)
    error = np.abs(aligned(traced, sources, targets) - weight_NxM).max() / np.abs(weight_NxM).max()
    size_SxR = aligned(dataclasses.replace(traced, weight_SxR=shares(traced)), truth.sources, truth.targets)
    # Without pairs that no path can join: they are easy to get right and would raise the AUROC.
    is_possible_SxR, true_SxR = possible(truth), shares(truth) > NOTHING
    auroc = roc_auc_score(true_SxR[is_possible_SxR], size_SxR[is_possible_SxR])
    predicted, actual = circuit(traced, SHARE), circuit(truth, SHARE)
    both = len(predicted & actual)
    return float(error), float(auroc), both / max(len(predicted), 1), both / len(actual)

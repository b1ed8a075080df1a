"""Edges of a transformer set by hand, products of its weights along all paths, and attribution graphs beside them."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import FEATURE, LOGIT, TOKEN
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.trace.prompt import trace
from saejax.ground_truth.circuits.handset import HandSet, run
from saejax.ground_truth.results import EdgeScores
from saejax.ground_truth.scores import over_seeds
from saejax.models.language_model import LanguageModel
from saejax.tasks.behaviours import Prompt

# Relative to a graph's largest edge: smaller edges count as 0, because a neuron may fire by its bias alone. Relative to
# the largest activation: smaller activations count as 0, because at exactly 0 rounding decides.
NOTHING = 1e-5
SHARE = 0.01  # of a target's largest edge; smaller edges are in no circuit
_UNMATCHED = 1 << 20  # added to the index of a feature that matches no neuron

Node = tuple[int, int, int]  # layer, position, neuron; layer -1: the word there; behind the last layer: the logit
Edge = tuple[Node, Node]  # source, target


@dataclasses.dataclass(frozen=True)
class Edges:
    """Edges between nodes."""

    sources: tuple[Node, ...]  #: source nodes
    targets: tuple[Node, ...]  #: target nodes; the last is the logit
    weight_SxR: np.ndarray  #: contribution of each source to each target: to a neuron before its relu, or to the logit


def known_edges(model: HandSet, prompt: Prompt) -> Edges:
    """Return the edges between a prompt's words, active neurons, and the logit of the correct minus the wrong answer.

    A source's output passes through the heads of every later layer, with their attention weights on this text, and is
    read by neurons and logits. As in attribution graphs, neurons at the first position are left out.
    """
    forward = run(model, prompt.text)
    length, last = len(forward.start_TxJ), len(forward.start_TxJ) - 1
    firing = [
        (layer, int(position), int(neuron))
        for layer, act_TxF in enumerate(forward.acts)
        for position, neuron in np.argwhere(act_TxF > NOTHING * act_TxF.max())
        if position
    ]
    sources: list[Node] = [*((-1, position, -1) for position in range(length)), *firing]
    targets: list[Node] = [*firing, (len(model.layers), last, -1)]
    stream_SxTxJ = np.zeros((len(sources), length, len(model.directions)))
    stream_SxTxJ[np.arange(length), np.arange(length)] = forward.start_TxJ
    parts = []
    for layer, (moves, spec) in enumerate(zip(forward.moves, model.layers, strict=True)):
        # Attention weights come from the whole text: along them the stream is linear in every source.
        stream_SxTxJ = stream_SxTxJ + sum(at_TxS @ stream_SxTxJ @ moved_JxJ for at_TxS, moved_JxJ in moves)
        nodes = [node for node in firing if node[0] == layer]
        position_N, neuron_N = (np.array([node[i] for node in nodes], int) for i in (1, 2))
        reads_FxJ, writes_FxJ = (
            model.vectors([getattr(neuron, part) for neuron in spec.neurons]) for part in ("reads", "writes")
        )
        parts.append(np.einsum("snj,nj->sn", stream_SxTxJ[:, position_N], reads_FxJ[neuron_N]))
        rows = [sources.index(node) for node in nodes]
        # After the layer's neurons have read: they do not read one another.
        stream_SxTxJ[rows, position_N] += forward.acts[layer][position_N, neuron_N, None] * writes_FxJ[neuron_N]
    answers = (prompt.correct.strip(), prompt.wrong.strip())
    along_1xJ = np.subtract(*(model.vectors([model.logits.get(word, {})]) for word in answers))
    parts.append(stream_SxTxJ[:, last] @ along_1xJ.T)
    return Edges(tuple(sources), tuple(targets), np.concatenate(parts, axis=1))


def circuit(edges: Edges, share: float) -> set[Edge]:
    """Return the edges that lead to the logit: from each target that leads there, its large edges back to the words.

    Args:
      edges: all edges.
      share: smallest size of an edge, relative to its target's largest; above 0.
    """
    # Relative to each target's largest edge, as targets differ in size by orders of magnitude.
    share_SxR, column = shares(edges), {node: place for place, node in enumerate(edges.targets)}
    logit, edges_to_logit = edges.targets[-1], set[Edge]()
    open_nodes, seen = [logit], {logit}
    while open_nodes:
        target = open_nodes.pop()
        for place in np.flatnonzero(share_SxR[:, column[target]] >= share):
            source = edges.sources[place]
            edges_to_logit.add((source, target))
            if source in column and source not in seen:
                seen.add(source)
                open_nodes.append(source)
    return edges_to_logit


def shares(edges: Edges) -> np.ndarray:
    """Return the size of each edge relative to its target's largest, [S, R]; tiny targets use a floor instead."""
    size_SxR = np.abs(edges.weight_SxR)
    largest_1xR = size_SxR.max(axis=0, initial=0.0, keepdims=True)
    return size_SxR / np.maximum(largest_1xR, NOTHING * largest_1xR.max())


def aligned(edges: Edges, sources: Sequence[Node], targets: Sequence[Node]) -> np.ndarray:
    """Return the weights between some nodes, [S, R]; 0 where a node does not exist."""
    row, column = ({node: place for place, node in enumerate(side)} for side in (edges.sources, edges.targets))
    padded_SxR = np.pad(edges.weight_SxR, ((0, 1), (0, 1)))  # the last row and column stand for missing nodes
    return padded_SxR[np.ix_([row.get(node, -1) for node in sources], [column.get(node, -1) for node in targets])]


def possible(edges: Edges) -> np.ndarray:
    """Return where a source can reach a target: in an earlier layer and at no later position; bool [S, R]."""
    sources_Sx3, targets_Rx3 = np.array(edges.sources), np.array(edges.targets)
    earlier_SxR = sources_Sx3[:, None, 0] < targets_Rx3[None, :, 0]
    return earlier_SxR & (sources_Sx3[:, None, 1] <= targets_Rx3[None, :, 1])


def graph_edges(graph: Graph, neuron_of: Mapping[tuple[int, int], int]) -> Edges:
    """Return a graph's edges between words, the neurons that features match, and the logit.

    Args:
      graph: the graph.
      neuron_of: (layer, feature) -> the neuron that it matches; other features match none.
    """
    nodes, silent_N = graph.nodes, np.zeros(len(graph.nodes.kind_N), bool)
    for layer in range(graph.n_layers):  # the same rule as in known_edges, layer by layer
        own_N = (nodes.kind_N == FEATURE) & (nodes.layer_N == layer)
        silent_N |= own_N & (nodes.value_N <= NOTHING * nodes.value_N[own_N].max(initial=0.0))
    kept_N = np.isin(nodes.kind_N, (FEATURE, TOKEN)) & ~silent_N
    names: list[Node] = [
        (layer, position, neuron_of.get((layer, index), _UNMATCHED + index))
        if kind == FEATURE
        else (graph.n_layers if kind == LOGIT else layer, position, -1)
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
      neuron_of: as for ``graph_edges``.
    """
    rows = []
    for prompt in prompts:
        answers = model.token_id(prompt.correct), model.token_id(prompt.wrong)
        graph = trace(model, transcoders, prompt.text, targets=[answers])
        traced = graph_edges(graph, neuron_of)
        rows.append((*_scores(traced, known_edges(spec, prompt)), graph.scores().replacement))
    columns = [over_seeds(column) for column in list(zip(*rows, strict=True))[1:]]
    # The largest error of all prompts: an exact graph must be exact on each.
    return EdgeScores(len(prompts), max(row[0] for row in rows), *columns)


def _scores(traced: Edges, truth: Edges) -> tuple[float, float, float, float]:
    """Return error, AUROC, precision and recall of one graph."""
    from sklearn.metrics import roc_auc_score

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

"""Edges of a transformer set by hand: products of its weights along all paths between neurons, in float64."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from saejax.ground_truth.circuits.handset import HandSet, run

# Relative to a graph's largest edge: smaller edges count as 0, because a neuron may fire by its bias alone. Relative to
# the largest activation: smaller activations count as 0, because at exactly 0 rounding decides.
NOTHING = 1e-5

Node = tuple[int, int, int]  # layer, position, neuron; layer -1: the word there; behind the last layer: the logit
Edge = tuple[Node, Node]  # source, target


@dataclasses.dataclass(frozen=True)
class Edges:
    """Edges between nodes.

    Attributes:
      sources: source nodes.
      targets: target nodes; the last is the logit.
      weight_SxR: contribution of each source to each target: to a neuron before its relu, or to the logit.
    """

    sources: tuple[Node, ...]
    targets: tuple[Node, ...]
    weight_SxR: np.ndarray

    @property
    def root(self) -> Node:
        """The logit."""
        return self.targets[-1]


def known_edges(model: HandSet, text: str, better: str, worse: str) -> Edges:
    """Return the edges of a text between its words, active neurons, and the logit of the better minus the worse word.

    A source's output passes through the heads of every later layer, with their attention weights on this text, and is
    read by neurons and logits. As in attribution graphs, neurons at the first position are left out.
    """
    forward = run(model, text)
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
        # Attention weights are those of the whole text: along them the stream is linear in every source.
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
    along_1xJ = np.subtract(*(model.vectors([model.logits.get(word, {})]) for word in (better, worse)))
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
    open_nodes, seen, edges_to_logit = [edges.root], {edges.root}, set[Edge]()
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


def renamed(edges: Edges, names: Callable[[Node], Node]) -> Edges:
    """Return the same edges between renamed nodes."""
    return Edges(tuple(map(names, edges.sources)), tuple(map(names, edges.targets)), edges.weight_SxR)


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

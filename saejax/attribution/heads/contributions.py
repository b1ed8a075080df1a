"""Contributions of attention heads to the edges of a graph.

The contribution of a head to an edge is what the edge loses when that head's path, from the values it mixes to what it
adds to the stream, is taken out of the local replacement model and all else stays. It is signed. A path through several
heads, one after the other, counts for each of them, so contributions need not add up to the edge.

1. Sources are pushed up in blocks: v[s], what source s adds to the values that the heads of each layer mix.
2. Targets are pulled down in blocks: g[t], what target t reads of these values through each head.
3. The contribution is their dot product over positions and the head's dimensions.

Where the values of all sources are more than half of the free memory, targets are pulled down again for each part.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN
from saejax.attribution.local.model import LocalModel, Vectors
from saejax.attribution.local.readouts import Readouts
from saejax.models.layers import einsum
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import free_bytes

_POSITIONS = {"cpu": 1 << 10, "gpu": 1 << 14, "tpu": 1 << 14}  # of the nodes of a block, together
_BLOCK = 16, 128  # least and largest size of a block


@dataclasses.dataclass(frozen=True)
class LeadingHead:
    """A head with large contributions.

    Attributes:
      layer, head: its layer, and its index there.
      logit: sum of its contributions to edges into the first logit, signed, in the logit's units.
      mean: mean over targets of its contributions over the target's input by size, signed; heads do not add up to 1.
      edge: source and target, as indices of the graph's nodes, of its largest contribution by size.
      contribution: to this edge.
    """

    layer: int
    head: int
    logit: float
    mean: float
    edge: tuple[int, int]
    contribution: float


class HeadContributions:
    """Contributions of heads to the edges of a graph, filled in by ``add``.

    Args:
      graph: a pruned one.
      layers, heads: of the model, and of each layer.
      top: heads that are kept of each edge, those of the largest contributions by size.

    Attributes:
      source_E, target_E: the edges' ends, as indices of the graph's nodes; target by target.
      head_ExJ, value_ExJ: the heads of the largest contributions to each edge, layer x heads + head, and these.
    """

    def __init__(self, graph: Graph, layers: int, heads: int, top: int):
        self._graph, self._heads = graph, heads
        self.source_E, self.target_E, weight_E = graph.edges()
        count = layers * heads
        self.head_ExJ = np.zeros((len(weight_E), min(top, count)), np.int32)
        self.value_ExJ = np.zeros(self.head_ExJ.shape, np.float32)
        self._input_N = np.bincount(self.target_E, np.abs(weight_E), len(graph.nodes))
        self._net_NxX = np.zeros((len(graph.nodes), count), np.float32)  # of each target, over its edges
        self._largest_X, self._edge_X = np.zeros(count, np.float32), np.zeros(count, np.int64)

    def add(self, edge_B: np.ndarray, value_BxX: np.ndarray) -> None:
        """Enter the contributions of all heads to some edges, each edge once."""
        rows, count = np.arange(len(edge_B))[:, None], self.head_ExJ.shape[1]
        size_BxX = np.abs(value_BxX)
        # Only the heads that are kept are sorted.
        top_BxJ = np.argpartition(-size_BxX, count - 1, axis=1)[:, :count]
        top_BxJ = np.take_along_axis(top_BxJ, np.argsort(-size_BxX[rows, top_BxJ], axis=1, kind="stable"), axis=1)
        self.head_ExJ[edge_B], self.value_ExJ[edge_B] = top_BxJ, value_BxX[rows, top_BxJ]
        # Not by +=, as several edges of a block may have one target.
        np.add.at(self._net_NxX, self.target_E[edge_B], value_BxX)
        best_X = size_BxX.argmax(axis=0)
        best_value_X = value_BxX[best_X, np.arange(value_BxX.shape[1])]
        is_larger_X = np.abs(best_value_X) > np.abs(self._largest_X)
        self._largest_X = np.where(is_larger_X, best_value_X, self._largest_X)
        self._edge_X = np.where(is_larger_X, edge_B[best_X], self._edge_X)

    def by_edge(self) -> dict[tuple[int, int], list[tuple[int, int, float]]]:
        """Return (source, target) -> (layer, head, contribution), the largest first; edges without any left out."""
        heads_by_edge = {}
        ends = zip(self.source_E.tolist(), self.target_E.tolist(), strict=True)
        for edge, heads, values in zip(ends, self.head_ExJ.tolist(), self.value_ExJ.tolist(), strict=True):
            heads_of_edge = [
                # Where fewer heads act than are kept, zeros fill up.
                (*divmod(head, self._heads), value)
                for head, value in zip(heads, values, strict=True)
                if value
            ]
            if heads_of_edge:
                heads_by_edge[edge] = heads_of_edge
        return heads_by_edge

    def named(self) -> dict[tuple[str, str], list[tuple[int, int, float]]]:
        """Return ``by_edge`` by the nodes' ids, as ``page.write_page`` takes it, to four digits."""
        ids = self._graph.ids
        return {
            (ids[source], ids[target]): [(layer, head, float(f"{value:.4g}")) for layer, head, value in heads]
            for (source, target), heads in self.by_edge().items()
        }

    def leading(self, count: int = 10) -> list[LeadingHead]:
        """Return the heads of the largest contributions, relative to targets' inputs by size, mean over targets."""
        targets = np.flatnonzero(self._input_N > 0)
        if not len(targets):
            return []
        # Relative to the target's input: otherwise targets with large activations would decide alone.
        relative_TxX = self._net_NxX[targets] / self._input_N[targets, None]
        size_X, mean_X = np.abs(relative_TxX).mean(axis=0), relative_TxX.mean(axis=0)
        logit_X = self._net_NxX[self._graph.slice_of(LOGIT).start]
        best = [head for head in np.argsort(-size_X, kind="stable").tolist() if size_X[head] > 0][:count]
        return [
            LeadingHead(
                layer=head // self._heads,
                head=head % self._heads,
                logit=float(logit_X[head]),
                mean=float(mean_X[head]),
                edge=(int(self.source_E[self._edge_X[head]]), int(self.target_E[self._edge_X[head]])),
                contribution=float(self._largest_X[head]),
            )
            for head in best
        ]


def head_contributions(local: LocalModel, readouts: Readouts, graph: Graph, top: int = 3) -> HeadContributions:
    """Return the contributions of all heads to each edge.

    Args:
      local: the local replacement model of which the graph is.
      readouts: the targets of the graph.
      graph: a pruned one; bias and first_mlp nodes have no edges here.
      top: heads that are kept of each edge.
    """
    config, length = local.model.config, local.stream_LxTxD.shape[1]
    result = HeadContributions(graph, config.n_layers, config.n_heads, top)
    sources, targets = np.unique(result.source_E), np.unique(result.target_E)
    if not len(sources):
        return result
    mesh = local.model.mesh
    size = min(max(_POSITIONS[mesh.devices.flat[0].platform] // length, _BLOCK[0]), _BLOCK[1])
    added, read = _source_vectors(local, graph, sources), _target_vectors(local, readouts, graph, targets)
    values_bytes = 4 * size * config.n_layers * config.n_kv_heads * config.d_head * length
    # Half of what is free: the targets' cotangents and products take the rest.
    together = max(free_bytes(mesh) // 2 // values_bytes, 1)  # blocks of sources whose values are kept
    layer_S, layer_R = graph.nodes.layer_N[sources], graph.nodes.layer_N[targets]
    source_blocks = list(_blocks(layer_S, size))
    for start in range(0, len(source_blocks), together):
        # 1. Sources up.
        pushed = [
            (block, {layer: values for layer, _, values in local.pushforward(added.choose(block), size)})
            for block in source_blocks[start : start + together]
        ]
        for target_block in _blocks(-layer_R, size):
            # 2. Targets down. 3. Products, for the edges between each pair of blocks.
            pairs = [_edges_between(result, sources[block], targets[target_block]) for block, _ in pushed]
            parts = [np.zeros((len(edges), config.n_layers, config.n_heads), np.float32) for edges, *_ in pairs]
            for layer, wanted in local.pull_values(read.choose(target_block), size):
                for (_, values), (edges, source_B, target_B), part_BxLxH in zip(pushed, pairs, parts, strict=True):
                    if len(edges) and layer in values:
                        part_NxRxGxS = to_host(_products(wanted, values[layer]))
                        part_BxNxG = part_NxRxGxS[:, target_B, :, source_B]
                        part_BxLxH[:, layer] = part_BxNxG.reshape(len(edges), config.n_heads)
            for (edges, *_), part_BxLxH in zip(pairs, parts, strict=True):
                if len(edges):
                    result.add(edges, part_BxLxH.reshape(len(edges), -1))
    return result


@jax.jit
def _products(wanted_NxRxGxTxK: jax.Array, values_NxTxKxS: jax.Array) -> jax.Array:
    return einsum("nrgtk,ntks->nrgs", wanted_NxRxGxTxK, values_NxTxKxS)


def _blocks(order_N: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield indices in blocks of at most ``size``, in the order of ``order_N``."""
    order = np.argsort(order_N, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _edges_between(
    result: HeadContributions, source_S: np.ndarray, target_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the edges from some sources to some targets, and the indices of their ends among these."""
    count = int(max(result.source_E.max(), result.target_E.max())) + 1
    index_of = np.full((2, count), -1)
    index_of[0, source_S], index_of[1, target_R] = np.arange(len(source_S)), np.arange(len(target_R))
    source_E, target_E = index_of[0, result.source_E], index_of[1, result.target_E]
    edges = np.flatnonzero((source_E >= 0) & (target_E >= 0))
    return edges, source_E[edges], target_E[edges]


def _source_vectors(local: LocalModel, graph: Graph, chosen: np.ndarray) -> Vectors:
    """Return what sources add, by the layer whose entering stream it is added to."""
    nodes, transcoders = graph.nodes[chosen], local.dictionaries
    features, errors, tokens = (np.flatnonzero(nodes.kind_N == kind) for kind in (FEATURE, ERROR, TOKEN))
    count_S = np.ones(len(nodes), np.int64)
    count_S[features] = [transcoders.written_layers(layer) for layer in nodes.layer_N[features].tolist()]
    start_S = np.cumsum(count_S) - count_S
    node_E = np.repeat(np.arange(len(nodes)), count_S)
    vector_ExD = np.zeros((len(node_E), local.model.config.d_model), np.float32)
    for layer in np.unique(nodes.layer_N[features]).tolist():
        here = features[nodes.layer_N[features] == layer]
        writes_FxXxD = nodes.value_N[here, None, None] * transcoders.writes(layer, nodes.index_N[here])
        vector_ExD[start_S[here][:, None] + np.arange(writes_FxXxD.shape[1])] = writes_FxXxD
    vector_ExD[start_S[errors]] = to_host(local.error_LxTxD)[nodes.layer_N[errors], nodes.position_N[errors]]
    vector_ExD[start_S[tokens]] = to_host(local.stream_LxTxD[0])[nodes.position_N[tokens]]
    # A feature writes to its own and each later layer, one entry after the other.
    layer_E = nodes.layer_N[node_E] + 1 + np.arange(len(node_E)) - start_S[node_E]  # tokens have the layer -1
    return Vectors(node_E, layer_E, nodes.position_N[node_E], vector_ExD)


def _target_vectors(local: LocalModel, readouts: Readouts, graph: Graph, chosen: np.ndarray) -> Vectors:
    """Return what targets read, by the layer of their transcoder, or L + the layer whose entering stream they read."""
    nodes, n_layers = graph.nodes[chosen], local.model.config.n_layers
    features, logits = (np.flatnonzero(nodes.kind_N == kind) for kind in (FEATURE, LOGIT))
    layer_R, vector_RxD = nodes.layer_N.copy(), np.zeros((len(nodes), local.model.config.d_model), np.float32)
    of_features = nodes[features]
    index = local.active.find(of_features.layer_N, of_features.position_N, of_features.index_N)
    vector_RxD[features] = local.encoder_rows(index)
    number = chosen[logits] - graph.slice_of(LOGIT).start
    vector_RxD[logits] = readouts.vector_KxD[number]
    layer_R[logits] = n_layers + readouts.layer_K[number]
    return Vectors(np.arange(len(nodes)), layer_R, nodes.position_N, vector_RxD)

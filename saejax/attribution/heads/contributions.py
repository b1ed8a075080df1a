"""Contributions of attention heads to the edges of a graph.

The contribution of a head to an edge is what the edge loses when that head's path, from the values it mixes to what it
adds to the stream, is taken out of the local replacement model and all else stays. It is signed. A path through several
heads, one after the other, counts for each of them, so contributions need not add up to the edge.

1. Sources are pushed up in blocks: v[s], what source s adds to the values that the heads of each layer mix.
2. Targets are pulled down in blocks: g[t], what target t reads of these values through each head.
3. The contribution is their dot product over positions and the head's dimensions.

Where the values of all sources are more than half of the free memory, targets are pulled down again for each part.
"""

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


def head_contributions(local: LocalModel, readouts: Readouts, graph: Graph) -> np.ndarray:
    """Return the contributions of all heads to each edge, signed, fp32 [E, L, H] in the order of ``graph.edges``.

    Args:
      local: the local replacement model of which the graph is.
      readouts: the targets of the graph.
      graph: a pruned one; bias and first_mlp nodes have no edges here.
    """
    config, length, mesh = local.model.config, local.stream_LxTxD.shape[1], local.model.mesh
    source_E, target_E, _ = graph.edges()
    value_ExLxH = np.zeros((len(source_E), config.n_layers, config.n_heads), np.float32)
    sources, index_E = np.unique(source_E, return_inverse=True)
    targets, target_index_E = np.unique(target_E, return_inverse=True)
    size = min(max(_POSITIONS[mesh.devices.flat[0].platform] // length, _BLOCK[0]), _BLOCK[1])
    added, read = _source_vectors(local, graph, sources), _target_vectors(local, readouts, graph, targets)
    values_bytes = 4 * size * config.n_layers * config.n_kv_heads * config.d_head * length
    # Half of what is free: the targets' cotangents and products take the rest.
    together = max(free_bytes(mesh) // 2 // values_bytes, 1)  # blocks of sources whose values are kept
    source_blocks = list(_blocks(graph.nodes.layer_N[sources], size))
    for start in range(0, len(source_blocks), together):
        # 1. Sources up.
        pushed = [
            (block, {layer: values for layer, _, values in local.pushforward(added.choose(block), size)})
            for block in source_blocks[start : start + together]
        ]
        for target_block in _blocks(-graph.nodes.layer_N[targets], size):
            # 2. Targets down.
            at_E = _places(target_block, len(targets))[target_index_E]
            edges = [np.flatnonzero((_places(block, len(sources))[index_E] >= 0) & (at_E >= 0)) for block, _ in pushed]
            for layer, wanted in local.pull_values(read.choose(target_block), size):
                # 3. Products, for the edges between each pair of blocks.
                for (block, values), edge_B in zip(pushed, edges, strict=True):
                    if len(edge_B) and layer in values:
                        part_NxRxGxS = to_host(_products(wanted, values[layer]))
                        at_B = _places(block, len(sources))[index_E[edge_B]]
                        part_BxNxG = part_NxRxGxS[:, at_E[edge_B], :, at_B]
                        value_ExLxH[edge_B, layer] = part_BxNxG.reshape(len(edge_B), config.n_heads)
    return value_ExLxH


def largest_heads(graph: Graph, value_ExLxH: np.ndarray, top: int = 3) -> dict[tuple[str, str], list]:
    """Return the largest contributions to each edge, edges without any left out.

    Args:
      graph: the graph.
      value_ExLxH: contributions of heads to its edges.
      top: heads of each edge.

    Returns:
      (id of the source, id of the target) -> (layer, head, contribution to four digits), the largest by size first, as
      ``page.write_page`` takes it.
    """
    ids, (source_E, target_E, _), (_, layers, heads) = graph.ids, graph.edges(), value_ExLxH.shape
    value_ExX = value_ExLxH.reshape(-1, layers * heads)
    # Only the heads that are kept are sorted.
    head_ExJ = np.argpartition(-np.abs(value_ExX), min(top, value_ExX.shape[1]) - 1, axis=1)[:, :top]
    top_ExJ = np.take_along_axis(value_ExX, head_ExJ, axis=1)
    edges = zip(source_E.tolist(), target_E.tolist(), head_ExJ.tolist(), top_ExJ.tolist(), strict=True)
    return {
        (ids[source], ids[target]): [
            (*divmod(head, heads), float(f"{value:.4g}"))
            for value, head in sorted(zip(values, numbers, strict=True), key=lambda pair: -abs(pair[0]))
            if value
        ]
        for source, target, numbers, values in edges
        if any(values)
    }


@jax.jit
def _products(wanted_NxRxGxTxK: jax.Array, values_NxTxKxS: jax.Array) -> jax.Array:
    return einsum("nrgtk,ntks->nrgs", wanted_NxRxGxTxK, values_NxTxKxS)


def _blocks(order_N: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield indices in blocks of at most ``size``, in the order of ``order_N``."""
    order = np.argsort(order_N, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _places(block: np.ndarray, count: int) -> np.ndarray:
    """Return where each of ``count`` nodes stands in a block; -1: it does not."""
    place_N = np.full(count, -1)
    place_N[block] = np.arange(len(block))
    return place_N


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
    """Return what targets read, by the layer of their transcoder, or L for the stream leaving the last layer."""
    nodes = graph.nodes[chosen]
    features, logits = (np.flatnonzero(nodes.kind_N == kind) for kind in (FEATURE, LOGIT))
    layer_R, vector_RxD = nodes.layer_N.copy(), np.zeros((len(nodes), local.model.config.d_model), np.float32)
    of_features = nodes[features]
    index = local.active.find(of_features.layer_N, of_features.position_N, of_features.index_N)
    vector_RxD[features] = local.encoder_rows(index)
    vector_RxD[logits] = readouts.vector_KxD[chosen[logits] - graph.slice_of(LOGIT).start]
    layer_R[logits] = local.model.config.n_layers
    return Vectors(np.arange(len(nodes)), layer_R, nodes.position_N, vector_RxD)

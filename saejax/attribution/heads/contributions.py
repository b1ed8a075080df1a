"""Contributions of attention heads to the edges of a graph.

The contribution of a head to an edge is what the edge loses when that head's path, from the values it mixes to what it
adds to the stream, is taken out of the local replacement model and all else stays. It is signed. A path through several
heads, one after the other, counts for each of them, so contributions need not add up to the edge.

1. Sources are pushed up in blocks: v[s], what source s adds to the values that the heads of each layer mix.
2. Targets are pulled down in blocks: g[t], what target t reads of these values through each head.
3. The contribution is their dot product over positions and the head's dimensions.

Where the values of all sources are more than half of the free memory, targets are pulled down again for each part.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN, Nodes
from saejax.attribution.local.dictionaries import FeatureOutputs
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.readouts import Readouts, scatter_directions
from saejax.models.layers import einsum
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import free_bytes

_POSITIONS = {"cpu": 1 << 10, "gpu": 1 << 14, "tpu": 1 << 14}  # of the nodes of a block, together
_BLOCK = 16, 128  # least and largest size of a block


def head_contributions(local: LocalModel, readouts: Readouts, graph: Graph) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield edges, [B] indices in the order of ``graph.edges``, and what each head gives to them, fp32 [B, L, H].

    Those into a block of targets come together; each edge comes once.

    Args:
      local: the local replacement model of which the graph is.
      readouts: the targets of the graph.
      graph: a pruned one; bias and first_mlp nodes have no edges here.
    """
    config, length, mesh = local.model.config, local.stream_LxTxD.shape[1], local.model.mesh
    nodes, (source_E, target_E, _) = graph.nodes, graph.edges()
    sources, targets = np.unique(source_E), np.unique(target_E)
    size = min(max(_POSITIONS[mesh.devices.flat[0].platform] // length, _BLOCK[0]), _BLOCK[1])
    values_bytes = 4 * size * config.n_layers * config.n_kv_heads * config.d_head * length
    # Half of what is free: the targets' cotangents and products take the rest.
    together = max(free_bytes(mesh) // 2 // values_bytes, 1)  # blocks of sources whose values are kept
    source_blocks = list(_blocks(sources, nodes.layer_N[sources], size))
    for start in range(0, len(source_blocks), together):
        # 1. Sources up.
        pushed, part = [], source_blocks[start : start + together]
        in_part_E = np.isin(source_E, np.concatenate(part))
        for block in part:
            first = int(nodes.layer_N[block].min()) + 1  # tokens have the layer -1
            steps = local.pushforward(_source_writer(local, nodes[block], size), first)
            pushed.append((_places(block, len(nodes)), {layer: values for layer, _, values in steps}))
        for block in _blocks(targets, -nodes.layer_N[targets], size):
            # 2. Targets down.
            row_E = _places(block, len(nodes))[target_E]
            edge_B = np.flatnonzero(in_part_E & (row_E >= 0))
            if not len(edge_B):
                continue
            value_BxLxH = np.zeros((len(edge_B), config.n_layers, config.n_heads), np.float32)
            for layer, wanted in local.pull_values(_target_reader(local, readouts, graph, block, size)):
                # 3. Products, for the edges between each pair of blocks.
                for place_N, values in pushed:
                    column_B = place_N[source_E[edge_B]]
                    here = np.flatnonzero(column_B >= 0)
                    if len(here) and layer in values:
                        part_NxRxGxS = to_host(_products(wanted, values[layer]))
                        part_BxNxG = part_NxRxGxS[:, row_E[edge_B[here]], :, column_B[here]]
                        value_BxLxH[here, layer] = part_BxNxG.reshape(len(here), config.n_heads)
            yield edge_B, value_BxLxH


def largest_heads(local: LocalModel, readouts: Readouts, graph: Graph, top: int = 3) -> dict[tuple[str, str], list]:
    """Return the largest contributions of heads to each edge, edges without any left out.

    Args:
      local: see ``head_contributions``.
      readouts: see there.
      graph: see there.
      top: heads of each edge.

    Returns:
      (id of the source, id of the target) -> (layer, head, contribution to four digits), the largest by size first, as
      ``page.write_page`` takes it.
    """
    ids, (source_E, target_E, _), largest = graph.ids, graph.edges(), dict[tuple[str, str], list]()
    for edge_B, value_BxLxH in head_contributions(local, readouts, graph):
        value_BxX, heads = value_BxLxH.reshape(len(edge_B), -1), value_BxLxH.shape[2]
        # Only the heads that are kept are sorted.
        head_BxJ = np.argpartition(-np.abs(value_BxX), min(top, value_BxX.shape[1]) - 1, axis=1)[:, :top]
        top_BxJ = np.take_along_axis(value_BxX, head_BxJ, axis=1)
        ends = source_E[edge_B].tolist(), target_E[edge_B].tolist()
        for source, target, numbers, values in zip(*ends, head_BxJ.tolist(), top_BxJ.tolist(), strict=True):
            ranked = sorted(zip(values, numbers, strict=True), key=lambda pair: -abs(pair[0]))
            if any(values):
                largest[ids[source], ids[target]] = [
                    (*divmod(head, heads), float(f"{value:.4g}")) for value, head in ranked if value
                ]
    return largest


@jax.jit
def _products(wanted_NxRxGxTxK: jax.Array, values_NxTxKxS: jax.Array) -> jax.Array:
    return einsum("nrgtk,ntks->nrgs", wanted_NxRxGxTxK, values_NxTxKxS)


def _blocks(chosen: np.ndarray, order_N: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield chosen nodes in blocks of at most ``size``, in the order of ``order_N``."""
    order = np.argsort(order_N, kind="stable")
    for start in range(0, len(order), size):
        yield chosen[order[start : start + size]]


def _places(block: np.ndarray, count: int) -> np.ndarray:
    """Return where each of ``count`` nodes stands in a block; -1: it does not."""
    place_N = np.full(count, -1)
    place_N[block] = np.arange(len(block))
    return place_N


def _source_writer(local: LocalModel, nodes: Nodes, size: int) -> Callable[[int], np.ndarray | None]:
    """Return a function of a layer that gives what each source adds to the stream entering it, fp32 [S, T, D], or None.

    It is called for layer after layer.
    """
    length = local.stream_LxTxD.shape[1]
    outputs, place_N = FeatureOutputs(local.dictionaries, size, length), np.arange(len(nodes)) * length
    place_N += nodes.position_N

    def added(layer: int) -> np.ndarray | None:
        # Features and errors are parts of the MLP's output one layer below.
        here_N = nodes.layer_N == layer - 1
        features = here_N & (nodes.kind_N == FEATURE)
        outputs.add(layer - 1, place_N[features], nodes.index_N[features], nodes.value_N[features])
        kind, table_LxTxD = (TOKEN, local.stream_LxTxD) if layer == 0 else (ERROR, local.error_LxTxD)
        others = np.flatnonzero(here_N & (nodes.kind_N == kind))
        if not len(others) and layer - 1 not in outputs:
            return None
        value_SxTxD, position_X = outputs.pop(layer - 1), nodes.position_N[others]
        value_SxTxD[others, position_X] = to_host(table_LxTxD[max(layer - 1, 0)])[position_X]
        return value_SxTxD

    return added


def _target_reader(
    local: LocalModel, readouts: Readouts, graph: Graph, block: np.ndarray, size: int
) -> Callable[[int], np.ndarray]:
    """Return a function of a layer that gives what each target reads there, fp32 [R, T, D].

    The number of layers stands for the stream leaving the last one.
    """
    nodes, (length, width) = graph.nodes[block], local.stream_LxTxD.shape[1:]
    features, logits = (np.flatnonzero(nodes.kind_N == kind) for kind in (FEATURE, LOGIT))
    vector_RxD = np.zeros((len(nodes), width), np.float32)
    index = local.active.find(nodes.layer_N[features], nodes.position_N[features], nodes.index_N[features])
    vector_RxD[features] = local.encoder_rows(index)
    vector_RxD[logits] = readouts.vector_KxD[block[logits] - graph.slice_of(LOGIT).start]

    at = nodes.layer_N, nodes.position_N, vector_RxD
    return lambda layer: scatter_directions(layer, *at, (size, length))

"""Which attention heads carry the edges of a graph.

The part of an edge that goes through a head is what vanishes of it when that head's path, from the values it mixes to
what it adds to the stream, is taken out of the local replacement model and all else stays. A path through several
heads, one after the other, is counted for each of them, so parts need not add up to the edge.

With m[s] what source s adds to the head's mixture of values (from below), and g[t] what target t reads of it (from
above), the part is their dot product over positions and the head's dimensions: one pass up and one down for all edges,
or for as many sources and targets at a time as memory holds.
"""

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN
from saejax.attribution.heads.passes import STEP, Placed, edge_parts, mixed_values
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.trace.targets import Readouts
from saejax.errors import UserError
from saejax.parallel import to_host

MOST_BYTES = 2**31  # of what is kept between the two passes, and of the targets that go down at once
MOST_GROUPS = 8  # of sources, for each of which all targets go down again
Carried = dict[tuple[int, int], list[tuple[int, int, float]]]


class TooLarge(UserError):
    """A graph of too many sources for the memory."""


def edge_heads(replacement: Replacement, readouts: Readouts, graph: Graph, top: int = 3) -> Carried:
    """The heads that carry each edge.

    Args:
      replacement, readouts: of which the graph is.
      graph: a pruned one; bias and first_mlp nodes have no edges here.
      top: how many heads of each edge, those of the largest parts by size.

    Returns:
      (source, target), as places in the graph's table of nodes -> (layer, head, part), the largest first. Edges within
      one position that no head carries are left out.

    Raises:
      TooLarge: it would take more than ``MOST_GROUPS`` groups of sources, each of ``MOST_BYTES``.
    """
    source_E, target_E, _ = graph.edges()
    if not len(source_E):
        return {}
    found: Carried = {}
    for group in _source_groups(replacement, np.unique(source_E), len(source_E)):
        own = np.isin(source_E, group)
        part_XxE = _group_parts(replacement, readouts, graph, group, source_E[own], target_E[own])
        best_NxE = _largest(np.abs(part_XxE), top)
        for edge, ends in enumerate(zip(source_E[own].tolist(), target_E[own].tolist(), strict=True)):
            parts = [(x, float(part_XxE[x, edge])) for x in best_NxE[:, edge].tolist() if part_XxE[x, edge]]
            if parts:
                heads = replacement.model.config.n_heads
                found[ends] = [(x // heads, x % heads, part) for x, part in parts]
    return found


def _source_groups(replacement: Replacement, sources: np.ndarray, edges: int) -> list[np.ndarray]:
    """The sources in groups, for each of which what they add to all mixtures can be kept."""
    config, (_, length, _) = replacement.model.config, replacement.streams.stream_LxTxD.shape
    each = 4 * length * config.n_layers * config.n_heads * config.d_head
    size = MOST_BYTES // each // STEP * STEP
    if len(sources) > size * MOST_GROUPS:
        advice = f"prune the graph to about {size * MOST_GROUPS:,} nodes first" if size else "the prompt is too long"
        needed = f"{len(sources) * each / 2**30:,.1f} GiB"
        raise TooLarge(f"heads of {edges:,} edges between {len(sources):,} sources would take {needed}: {advice}")
    return np.array_split(sources, -(-len(sources) // size))


def _group_parts(
    replacement: Replacement,
    readouts: Readouts,
    graph: Graph,
    sources: np.ndarray,
    source_E: np.ndarray,
    target_E: np.ndarray,
) -> np.ndarray:
    """The part of every edge from some sources that goes through every head, [L H, E]."""
    config, (layers, length, width) = replacement.model.config, replacement.streams.stream_LxTxD.shape
    part_LxHxE = np.zeros((layers, config.n_heads, len(source_E)), np.float32)
    mixed = mixed_values(replacement, _entries(replacement, graph, sources))
    targets = np.unique(target_E)
    size = max(MOST_BYTES // (4 * length * (3 * width + config.n_heads * config.d_head)), 1)
    for group in np.array_split(targets, -(-len(targets) // size)):
        own = np.flatnonzero(np.isin(target_E, group))
        place = np.searchsorted(sources, source_E[own]), np.searchsorted(group, target_E[own])
        readers = _readers(replacement, readouts, graph, group)
        part_LxHxE[:, :, own] = edge_parts(replacement, mixed, readers, *place)
    return part_LxHxE.reshape(-1, len(source_E))


def _largest(size_XxE: np.ndarray, count: int) -> np.ndarray:
    """Which rows have the largest values of each column, the largest first; without sorting all."""
    count = min(count, len(size_XxE))
    some_NxE = np.argpartition(-size_XxE, count - 1, axis=0)[:count]
    order_NxE = np.argsort(-np.take_along_axis(size_XxE, some_NxE, axis=0), axis=0, kind="stable")
    return np.take_along_axis(some_NxE, order_NxE, axis=0)


def named_heads(carried: Carried, ids: list[str]) -> dict[tuple[str, str], list[tuple[int, int, float]]]:
    """The same by the nodes' ids, as ``page.write_page`` takes it, parts to four digits."""
    return {
        (ids[source], ids[target]): [(layer, head, float(f"{part:.4g}")) for layer, head, part in heads]
        for (source, target), heads in carried.items()
    }


def _entries(replacement: Replacement, graph: Graph, chosen: np.ndarray) -> Placed:
    """Of each source the layer that it enters, its position and its vector: [S], [S], [S, D]."""
    nodes, streams = graph.nodes[chosen], replacement.streams
    vector_SxD = np.zeros((len(nodes), replacement.model.config.d_model), np.float32)
    features, errors, tokens = (np.flatnonzero(nodes.kind_N == kind) for kind in (FEATURE, ERROR, TOKEN))
    for layer in np.unique(nodes.layer_N[features]):
        own = features[nodes.layer_N[features] == layer]
        rows_UxD = replacement.transcoders.rows(int(layer), "W_dec", nodes.index_N[own])
        vector_SxD[own] = nodes.value_N[own, None] * rows_UxD
    vector_SxD[errors] = to_host(streams.error_LxTxD)[nodes.layer_N[errors], nodes.position_N[errors]]
    vector_SxD[tokens] = to_host(streams.stream_LxTxD[0])[nodes.position_N[tokens]]
    return nodes.layer_N + 1, nodes.position_N, vector_SxD  # tokens have the layer -1


def _readers(replacement: Replacement, readouts: Readouts, graph: Graph, chosen: np.ndarray) -> Placed:
    """Of each target a layer, its position and its vector: [R], [R], [R, D].

    The layer is the one whose transcoder reads; of readouts, L + the one whose entering stream is read.
    """
    nodes, layers = graph.nodes[chosen], replacement.model.config.n_layers
    features = np.flatnonzero(nodes.kind_N == FEATURE)
    layer_R, vector_RxD = nodes.layer_N.copy(), np.zeros((len(nodes), replacement.model.config.d_model), np.float32)
    own = nodes[features]
    places = replacement.active.places(own.layer_N, own.position_N, own.index_N)
    vector_RxD[features] = replacement.encoder_rows(places)
    logits = np.flatnonzero(nodes.kind_N == LOGIT)
    number = chosen[logits] - graph.slice_of(LOGIT).start
    vector_RxD[logits] = readouts.vector_KxD[number]
    layer_R[logits] = layers + readouts.layer_K[number]
    return layer_R, nodes.position_N, vector_RxD

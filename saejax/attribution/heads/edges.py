"""Which attention heads carry the edges of a graph.

The part of an edge that goes through a head is what vanishes of it when that head's path, from the values it mixes to
what it adds to the stream, is taken out of the local replacement model and all else stays. A path through several
heads, one after the other, is counted for each of them, so parts need not add up to the edge.

With v[s] what source s adds to the values that a head mixes (from below), and g[t] what target t reads of these values
through the head (from above), the part is their dot product over positions and the head's dimensions. Sources go up in
blocks of similar positions and layers, of which nothing is kept below their lowest layer or before their first
position; targets go down in blocks. Where the values of all sources are more than half of the memory that is free, the
targets go down again for each part of them.
"""

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN
from saejax.attribution.heads.carried import Carried
from saejax.attribution.heads.passes import Placed, carry_down, carry_up, through
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.trace.memory import heads_block
from saejax.attribution.trace.targets import Readouts
from saejax.models.config import DecoderConfig
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import free_bytes

_PARTS = 4  # parts of a prompt in which sources of a block begin, and in which targets of a block end
_ENTERED = 1 << 24  # parts of edges that are kept until they are entered


class EndBlock(NamedTuple):
    """Sources that go up together, or targets that go down.

    Attributes:
      chosen_B: which.
      layer: the lowest of the sources', the highest of the targets'.
      position: before it the sources change nothing; from it on the targets read nothing.
    """

    chosen_B: np.ndarray
    layer: int
    position: int


def edge_heads(replacement: Replacement, readouts: Readouts, graph: Graph, top: int = 3) -> Carried:
    """The heads that carry each edge.

    Args:
      replacement, readouts: of which the graph is.
      graph: a pruned one; bias and first_mlp nodes have no edges here.
      top: how many heads of each edge are told apart.
    """
    config, (_, length, _) = replacement.model.config, replacement.stream_LxTxD.shape
    carried = Carried(graph, config.n_layers, config.n_heads, top)
    sources, targets = np.unique(carried.source_E), np.unique(carried.target_E)
    if not len(sources):
        return carried
    entries, readers = _entries(replacement, graph, sources), _readers(replacement, readouts, graph, targets)
    mesh = replacement.model.mesh
    size = heads_block(mesh.devices.flat[0].platform, length)
    blocks = source_blocks(entries, config.n_layers, length, size)
    down = _target_blocks(readers, config.n_layers, length, size)
    ends, lock = (sources, targets), threading.Lock()
    # As the rows of a graph are: two programs side by side, but on several devices one after the other.
    with ThreadPoolExecutor(2 if mesh.size == 1 else 1) as pool:
        for group in _groups(blocks, config, length, size, max(free_bytes(mesh) // 2, 1)):
            values = list(pool.map(lambda block: _values(replacement, entries, block, size), group))
            above = list(zip(group, values, strict=True))
            go_down = functools.partial(_go_down, replacement, readers, above, carried, ends, lock, size)
            list(pool.map(go_down, down))
    return carried


def named_heads(carried: Carried, ids: list[str]) -> dict[tuple[str, str], list[tuple[int, int, float]]]:
    """The heads of each edge by the nodes' ids, as ``page.write_page`` takes them, parts to four digits."""
    return {
        (ids[source], ids[target]): [(layer, head, float(f"{part:.4g}")) for layer, head, part in heads]
        for (source, target), heads in carried.by_edge().items()
    }


def source_blocks(entries: Placed, layers: int, length: int, size: int) -> list[EndBlock]:
    """The sources in blocks of similar positions and, among these, of similar layers.

    Args:
      entries: what sources add.
      layers: of the model.
      length: of the prompt, padded.
      size: sources of a block, at the most.
    """
    first_S = np.unique(entries.node_E, return_index=True)[1]
    layer_S, position_S = entries.layer_E[first_S], entries.position_E[first_S]
    return [
        EndBlock(chosen_B, int(layer_S[chosen_B].min(initial=layers - 1)), part * length // _PARTS)
        for part, chosen_B in _in_blocks(position_S, layer_S, length, size)
    ]


def _target_blocks(readers: Placed, layers: int, length: int, size: int) -> list[EndBlock]:
    """The targets likewise."""
    # The highest layer that each goes down through; -1: none.
    top_R = np.where(readers.layer_E < layers, readers.layer_E, readers.layer_E - layers - 1)
    return [
        EndBlock(chosen_B, int(top_R[chosen_B].max(initial=0)), (part + 1) * length // _PARTS)
        for part, chosen_B in _in_blocks(readers.position_E, -top_R, length, size)
    ]


def _in_blocks(position_N: np.ndarray, order_N: np.ndarray, length: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Nodes in blocks of at most so many: the part of the prompt, and which they are.

    A part without nodes has an empty block: programs are compiled for each part, all of them with the first prompt.

    Args:
      position_N: of the nodes.
      order_N: what they are sorted by within a part.
      length: of the prompt, padded: a multiple of the number of parts.
    """
    part_N = position_N * _PARTS // length
    for part in range(_PARTS):
        own = np.flatnonzero(part_N == part)
        own = own[np.argsort(order_N[own], kind="stable")]
        for start in range(0, max(len(own), 1), size):
            yield part, own[start : start + size]


def _groups(blocks: list[EndBlock], config: DecoderConfig, length: int, size: int, most: int) -> list[list[EndBlock]]:
    """Blocks whose values can be kept together: that take ``most`` bytes, or one alone."""
    groups: list[list[EndBlock]] = []
    room = 0
    for block in blocks:
        values = (config.n_layers - block.layer) * (length - block.position) * config.n_kv_heads * config.d_head
        need = 4 * size * values
        if need > room or not groups:
            groups.append([])
            room = most
        groups[-1].append(block)
        room -= need
    return groups


def _values(replacement: Replacement, entries: Placed, block: EndBlock, size: int) -> list[jax.Array]:
    """What a block's sources add to the values of each layer from the block's own on, [N, X, K, S]."""
    params = replacement.model.params
    own, found = entries.chosen(block.chosen_B), []
    _, length, width = replacement.stream_LxTxD.shape
    change_SxXxD: Any = np.zeros((size, length - block.position, width), np.float32)
    for layer in range(block.layer, replacement.model.config.n_layers):
        fixed = params, np.int32(layer), replacement.stream_LxTxD, replacement.skip_LxDxD
        change_SxXxD, added_NxXxKxS = carry_up(replacement.frozen, *fixed, *own.at(layer, size), change_SxXxD)
        found.append(added_NxXxKxS)
    return found


def _go_down(
    replacement: Replacement,
    readers: Placed,
    above: list[tuple[EndBlock, list[jax.Array]]],
    carried: Carried,
    ends: tuple[np.ndarray, np.ndarray],
    lock: threading.Lock,
    size: int,
    below: EndBlock,
) -> None:
    """Takes a block of targets down, and enters the parts of their edges from some blocks of sources.

    Parts are entered for several layers at once: as few calls as memory allows.

    Args:
      above: the blocks of sources, and their values.
      ends: the nodes that sources and readers are.
      lock: held while parts are entered.
      below: which of the readers.
    """
    params, config = replacement.model.params, replacement.model.config
    pairs = _edges_between(carried, ends, [block for block, _ in above], below.chosen_B)
    count = sum(len(edges) for edges, *_ in pairs)
    if not count and len(below.chosen_B):
        return
    span = int(np.clip(_ENTERED // (max(count, 1) * config.n_heads), 1, config.n_layers))  # layers entered at once
    parts = [np.zeros((len(edges), span, config.n_heads), np.float32) for edges, *_ in pairs]
    own, width, end = readers.chosen(below.chosen_B), replacement.stream_LxTxD.shape[2], jnp.int32(below.position)
    cotangent_RxXxD: Any = np.zeros((size, below.position, width), np.float32)
    for layer in reversed(range(below.layer + 1)):
        fixed = params, np.int32(layer), replacement.stream_LxTxD, replacement.skip_LxDxD
        streamed_RxD, _ = own.at(config.n_layers + layer + 1, size)
        cotangent_RxXxD, wanted = carry_down(
            replacement.frozen, *fixed, streamed_RxD, *own.at(layer, size), cotangent_RxXxD
        )
        for (block, values), part_ExJxH, (edges, sources, targets) in zip(above, parts, pairs, strict=True):
            if layer >= block.layer and (len(edges) or not len(block.chosen_B)):
                part_NxRxGxS = to_host(through(wanted, values[layer - block.layer], end, _PARTS))
                found = part_NxRxGxS[:, targets, :, sources]
                part_ExJxH[:, layer % span] = found.reshape(len(edges), config.n_heads)
        if layer % span:
            continue
        for (block, _), part_ExJxH, (edges, *_) in zip(above, parts, pairs, strict=True):
            # No part of these edges is below their sources or above their targets.
            first, stop = max(layer, block.layer), min(layer + span, below.layer + 1)
            if len(edges) and first < stop:
                part_ExX = part_ExJxH[:, first - layer : stop - layer].reshape(len(edges), -1)
                with lock:
                    carried.add(edges, first, part_ExX)


def _edges_between(
    carried: Carried, ends: tuple[np.ndarray, np.ndarray], blocks: list[EndBlock], target_R: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The edges from blocks of sources to a block of targets, ascending, and the places of their ends in the blocks."""
    place_N = np.full(ends[1][-1] + 1, -1)
    place_N[ends[1][target_R]] = np.arange(len(target_R))
    own = np.flatnonzero(place_N[carried.target_E] >= 0)
    source, target = np.searchsorted(ends[0], carried.source_E[own]), place_N[carried.target_E[own]]
    found = []
    for block in blocks:
        place_S = np.full(len(ends[0]), -1)
        place_S[block.chosen_B] = np.arange(len(block.chosen_B))
        here = place_S[source] >= 0
        found.append((own[here], place_S[source[here]], target[here]))
    return found


def _entries(replacement: Replacement, graph: Graph, chosen: np.ndarray) -> Placed:
    """What the sources add, by the layer whose entering stream it is added to."""
    nodes, transcoders = graph.nodes[chosen], replacement.dictionaries
    count_S = np.ones(len(nodes), np.int64)
    features, errors, tokens = (np.flatnonzero(nodes.kind_N == kind) for kind in (FEATURE, ERROR, TOKEN))
    count_S[features] = [transcoders.written_layers(layer) for layer in nodes.layer_N[features].tolist()]
    start_S = np.cumsum(count_S) - count_S
    node_E = np.repeat(np.arange(len(nodes)), count_S)
    vector_ExD = np.zeros((len(node_E), replacement.model.config.d_model), np.float32)
    for layer in np.unique(nodes.layer_N[features]).tolist():
        own = features[nodes.layer_N[features] == layer]
        writes_FxXxD = nodes.value_N[own, None, None] * transcoders.writes(layer, nodes.index_N[own])
        vector_ExD[start_S[own][:, None] + np.arange(writes_FxXxD.shape[1])] = writes_FxXxD
    vector_ExD[start_S[errors]] = to_host(replacement.error_LxTxD)[nodes.layer_N[errors], nodes.position_N[errors]]
    vector_ExD[start_S[tokens]] = to_host(replacement.stream_LxTxD[0])[nodes.position_N[tokens]]
    layer_E = nodes.layer_N[node_E] + 1 + np.arange(len(node_E)) - start_S[node_E]  # tokens have the layer -1
    return Placed(node_E, layer_E, nodes.position_N[node_E], vector_ExD)


def _readers(replacement: Replacement, readouts: Readouts, graph: Graph, chosen: np.ndarray) -> Placed:
    """The targets by the layer whose transcoder reads; readouts by L + the one whose entering stream is read."""
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
    return Placed(np.arange(len(nodes)), layer_R, nodes.position_N, vector_RxD)

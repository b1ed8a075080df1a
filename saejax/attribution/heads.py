"""Which attention heads carry the edges of a graph.

The part of an edge that goes through a head is what vanishes of it when that head's path, from the values it mixes to
what it adds to the stream, is taken out of the local replacement model and all else stays. A path through several
heads, one after the other, is counted for each of them, so parts need not add up to the edge.

With m[s] what source s adds to the head's mixture of values (from below), and g[t] what target t reads of it (from
above), the part is their dot product over positions and the head's dimensions: one pass up and one down for all edges.

Letters: S sources, R targets, E edges; L, T, D, H heads, K dimensions of a head, as elsewhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.circuits import places_of
from saejax.attribution.frozen import FrozenModel
from saejax.attribution.graph import ERROR, FEATURE, LOGIT, TOKEN, Graph
from saejax.attribution.replacement import Replacement
from saejax.attribution.targets import Readouts
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import Reach, full_reaches, mix
from saejax.models.layers import einsum

MOST_BYTES = 2**31  # of what is kept between the two passes
Carried = dict[tuple[int, int], list[tuple[int, int, float]]]
Placed = tuple[np.ndarray, np.ndarray, np.ndarray]  # layers [N], positions [N], vectors [N, D]
_STEP = 16  # sources and targets are filled up to a multiple of this


class TooLarge(UserError):
    """A graph that is too large to be worked on at once."""


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
      TooLarge: what is kept between the two passes would take more than ``MOST_BYTES``.
    """
    source_E, target_E, _ = graph.edges()
    if not len(source_E):
        return {}
    sources, targets = np.unique(source_E), np.unique(target_E)
    config, (_, length, _) = replacement.model.config, replacement.streams.stream_LxTxD.shape
    kept = 4 * len(sources) * length * config.n_layers * config.n_heads * config.d_head
    if kept > MOST_BYTES:
        raise TooLarge(
            f"heads of {len(source_E):,} edges between {len(sources):,} sources would take {kept / 2**30:.1f} GiB: "
            f"prune the graph to about {int(len(sources) * MOST_BYTES / kept):,} nodes first"
        )
    entries, readers = _entries(replacement, graph, sources), _readers(replacement, readouts, graph, targets)
    place_E = np.searchsorted(sources, source_E), np.searchsorted(targets, target_E)
    part_LxHxE = _parts(replacement, entries, readers, *place_E)
    part_XxE = part_LxHxE.reshape(-1, len(source_E))
    best_NxE = np.argsort(-np.abs(part_XxE), axis=0, kind="stable")[:top]
    found = {}
    for edge, (source, target) in enumerate(zip(source_E.tolist(), target_E.tolist(), strict=True)):
        carried = [
            (x // config.n_heads, x % config.n_heads, float(part_XxE[x, edge]))
            for x in best_NxE[:, edge].tolist()
            if part_XxE[x, edge]
        ]
        if carried:
            found[source, target] = carried
    return found


def named_heads(carried: Carried, ids: list[str]) -> dict[tuple[str, str], list[tuple[int, int, float]]]:
    """The same by the nodes' ids, as ``page.write_page`` takes it."""
    return {(ids[source], ids[target]): heads for (source, target), heads in carried.items()}


def _entries(replacement: Replacement, graph: Graph, chosen: np.ndarray) -> Placed:
    """Of each source the layer that it enters, its position and its vector: [S], [S], [S, D]."""
    nodes, streams = graph.nodes[chosen], replacement.streams
    vector_SxD = np.zeros((len(nodes), replacement.model.config.d_model), np.float32)
    features, errors, tokens = (np.flatnonzero(nodes.kind_N == kind) for kind in (FEATURE, ERROR, TOKEN))
    for layer in np.unique(nodes.layer_N[features]):
        own = features[nodes.layer_N[features] == layer]
        rows_UxD = replacement.transcoders.rows(int(layer), "W_dec", nodes.index_N[own])
        vector_SxD[own] = nodes.value_N[own, None] * rows_UxD
    vector_SxD[errors] = np.asarray(streams.error_LxTxD)[nodes.layer_N[errors], nodes.position_N[errors]]
    vector_SxD[tokens] = np.asarray(streams.stream_LxTxD[0])[nodes.position_N[tokens]]
    return nodes.layer_N + 1, nodes.position_N, vector_SxD  # tokens have the layer -1


def _readers(replacement: Replacement, readouts: Readouts, graph: Graph, chosen: np.ndarray) -> Placed:
    """Of each target a layer, its position and its vector: [R], [R], [R, D].

    The layer is the one whose transcoder reads; of readouts, L + the one whose entering stream is read.
    """
    nodes, layers = graph.nodes[chosen], replacement.model.config.n_layers
    features = np.flatnonzero(nodes.kind_N == FEATURE)
    layer_R, vector_RxD = nodes.layer_N.copy(), np.zeros((len(nodes), replacement.model.config.d_model), np.float32)
    _, place = places_of(
        replacement.active, nodes.layer_N[features], nodes.position_N[features], nodes.index_N[features]
    )
    vector_RxD[features] = replacement.encoder_rows(place)
    logits = np.flatnonzero(nodes.kind_N == LOGIT)
    number = chosen[logits] - graph.slice_of(LOGIT).start
    vector_RxD[logits] = readouts.vector_KxD[number]
    layer_R[logits] = layers + readouts.layer_K[number]
    return layer_R, nodes.position_N, vector_RxD


def _parts(
    replacement: Replacement, entries: Placed, readers: Placed, source_E: np.ndarray, target_E: np.ndarray
) -> np.ndarray:
    """The part of every edge that goes through every head, [L, H, E]."""
    frozen, params, streams = replacement.frozen, replacement.model.params, replacement.streams
    layers, length, width = streams.stream_LxTxD.shape

    def placed(layer_N: np.ndarray, position_N: np.ndarray, vector_NxD: np.ndarray, layer: int) -> np.ndarray:
        """The vectors of one layer at their positions, [N, T, D], filled up."""
        at_NxTxD = np.zeros((-(-len(layer_N) // _STEP) * _STEP, length, width), np.float32)
        own = np.flatnonzero(layer_N == layer)
        at_NxTxD[own, position_N[own]] = vector_NxD[own]
        return at_NxTxD

    def skip(layer: int) -> jax.Array | None:
        return None if streams.skip_LxDxD is None else streams.skip_LxDxD[layer]

    mixed_LxSxTxHxK, change_SxTxD = [], jnp.asarray(placed(*entries, 0))
    for layer in range(layers):
        x_TxD = streams.stream_LxTxD[layer]
        change_SxTxD, mixed = carry_up(frozen, params, np.int32(layer), x_TxD, skip(layer), change_SxTxD)
        mixed_LxSxTxHxK.append(np.asarray(mixed))
        change_SxTxD += placed(*entries, layer + 1)
    found_LxHxE = []
    cotangent_RxTxD = jnp.asarray(placed(*readers, 2 * layers))
    for layer in reversed(range(layers)):
        x_TxD, read_RxTxD = streams.stream_LxTxD[layer], placed(*readers, layer)
        arguments = frozen, params, np.int32(layer), x_TxD, skip(layer), cotangent_RxTxD, read_RxTxD
        cotangent_RxTxD, wanted_RxTxHxK = carry_down(*arguments)
        cotangent_RxTxD += placed(*readers, layers + layer)
        part_RxSxH = np.asarray(through(wanted_RxTxHxK, mixed_LxSxTxHxK[layer]))
        found_LxHxE.append(part_RxSxH[target_E, source_E].T)
    return np.stack(found_LxHxE[::-1])


@functools.partial(jax.jit, static_argnums=0)
def carry_up(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    skip_DxD: jax.Array | None,
    change_SxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Changes of the stream through a layer [S, T, D], and what they add to the mixtures of its heads [S, T, H, K]."""

    def held(x_TxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixtures: list[jax.Array] = []

        def meet(q: jax.Array, k: jax.Array, v: jax.Array, reach: Reach) -> jax.Array:
            mixtures.append(mix(frozen.config, q, k, v, reach))
            return mixtures[0]

        reaches = full_reaches(frozen.config, len(x_TxD))
        return frozen.layer(params, layer, reaches, x_TxD, skip_DxD, meet)[0], mixtures[0]

    return jax.vmap(lambda change_TxD: jax.jvp(held, (x_TxD,), (change_TxD,))[1])(change_SxTxD)


@functools.partial(jax.jit, static_argnums=0)
def carry_down(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    skip_DxD: jax.Array | None,
    cotangent_RxTxD: jax.Array,
    read_RxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Cotangents through a layer [R, T, D], and what they read of the mixtures of its heads [R, T, H, K].

    Args:
      cotangent_RxTxD: of the stream leaving the layer.
      read_RxTxD: of what its transcoder reads.
    """
    config = frozen.config

    def held(x_TxD: jax.Array, more_TxHxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        def meet(q: jax.Array, k: jax.Array, v: jax.Array, reach: Reach) -> jax.Array:
            return mix(config, q, k, v, reach) + more_TxHxK

        return frozen.layer(params, layer, full_reaches(config, len(x_TxD)), x_TxD, skip_DxD, meet)

    nothing_TxHxK = jnp.zeros((len(x_TxD), config.n_heads, config.d_head), x_TxD.dtype)
    _, pull = jax.vjp(held, x_TxD, nothing_TxHxK)
    return jax.vmap(lambda cotangent_TxD, read_TxD: pull((cotangent_TxD, read_TxD)))(cotangent_RxTxD, read_RxTxD)


@jax.jit
def through(wanted_RxTxHxK: jax.Array, mixed_SxTxHxK: jax.Array) -> jax.Array:
    """The part of each pair that goes through each head, [R, S, H]."""
    return einsum("rthk,sthk->rsh", wanted_RxTxHxK, mixed_SxTxHxK)

"""The two passes that find which heads carry edges: sources up through the layers, targets down.

Both go through the frozen layers and stop by at the mixtures of values, where heads are still apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local.frozen import RELP, FrozenModel
from saejax.attribution.local.replacement import Replacement
from saejax.models import decoder
from saejax.models.attention import AttentionTables, attend, whole_prompts
from saejax.models.layers import einsum
from saejax.parallel import to_host

STEP = 16  # sources and targets are filled up to a multiple of this
Placed = tuple[np.ndarray, np.ndarray, np.ndarray]  # layers [N], positions [N], vectors [N, D]


def mixed_values(replacement: Replacement, entries: Placed) -> list[np.ndarray]:
    """What sources add to the mixtures of the heads of each layer, [S, T, H, K].

    Args:
      entries: the sources, by the layer whose entering stream they are in.
    """
    streams, params = replacement.streams, replacement.model.params
    mixed, change_SxTxD = [], jnp.asarray(_placed(replacement, entries, 0))
    for layer, x_TxD in enumerate(streams.stream_LxTxD):
        skip_DxD = replacement.skip(layer)
        change_SxTxD, added = carry_up(replacement.frozen, params, np.int32(layer), x_TxD, skip_DxD, change_SxTxD)
        mixed.append(to_host(added))
        change_SxTxD += _placed(replacement, entries, layer + 1)
    return mixed


def edge_parts(
    replacement: Replacement, mixed: list[np.ndarray], readers: Placed, source_E: np.ndarray, target_E: np.ndarray
) -> np.ndarray:
    """The part of every edge that goes through every head, [L, H, E].

    Args:
      mixed: of ``mixed_values``.
      readers: the targets; a layer of L or more is that of a stream, L + the one that it enters.
      source_E, target_E: places of the edges' ends in ``mixed`` and ``readers``.
    """
    frozen, params, streams = replacement.frozen, replacement.model.params, replacement.streams
    layers, found_LxHxE = len(mixed), []
    cotangent_RxTxD = jnp.asarray(_placed(replacement, readers, 2 * layers))
    for layer in reversed(range(layers)):
        fixed = frozen, params, np.int32(layer), streams.stream_LxTxD[layer], replacement.skip(layer)
        cotangent_RxTxD, wanted_RxTxHxK = carry_down(*fixed, cotangent_RxTxD, _placed(replacement, readers, layer))
        cotangent_RxTxD += _placed(replacement, readers, layers + layer)
        part_RxSxH = to_host(through(wanted_RxTxHxK, mixed[layer]))
        found_LxHxE.append(part_RxSxH[target_E, source_E].T)
    return np.stack(found_LxHxE[::-1])


def _placed(replacement: Replacement, vectors: Placed, layer: int) -> np.ndarray:
    """The vectors of one layer at their positions, [N, T, D], filled up."""
    (layer_N, position_N, vector_NxD), (_, length, width) = vectors, replacement.streams.stream_LxTxD.shape
    at_NxTxD = np.zeros((-(-len(layer_N) // STEP) * STEP, length, width), np.float32)
    own = np.flatnonzero(layer_N == layer)
    at_NxTxD[own, position_N[own]] = vector_NxD[own]
    return at_NxTxD


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

    def frozen_layer(x_TxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixtures: list[jax.Array] = []

        def look(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            mixtures.append(attend(frozen.config, RELP, q, k, v, tables))
            return mixtures[0]

        tables = whole_prompts(frozen.config, len(x_TxD))
        return frozen.layer(params, layer, tables, x_TxD, skip_DxD, look)[0], mixtures[0]

    return jax.vmap(lambda change_TxD: jax.jvp(frozen_layer, (x_TxD,), (change_TxD,))[1])(change_SxTxD)


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

    def frozen_layer(x_TxD: jax.Array, more_TxHxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            return attend(config, RELP, q, k, v, tables) + more_TxHxK

        return frozen.layer(params, layer, whole_prompts(config, len(x_TxD)), x_TxD, skip_DxD, add)

    nothing_TxHxK = jnp.zeros((len(x_TxD), config.n_heads, config.d_head), x_TxD.dtype)
    _, pull = jax.vjp(frozen_layer, x_TxD, nothing_TxHxK)
    return jax.vmap(lambda cotangent_TxD, read_TxD: pull((cotangent_TxD, read_TxD)))(cotangent_RxTxD, read_RxTxD)


@jax.jit
def through(wanted_RxTxHxK: jax.Array, mixed_SxTxHxK: jax.Array) -> jax.Array:
    """The part of each pair that goes through each head, [R, S, H]."""
    return einsum("rthk,sthk->rsh", wanted_RxTxHxK, mixed_SxTxHxK)

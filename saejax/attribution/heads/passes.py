"""The programs that find which heads carry edges: sources up through the layers, targets down, and their products.

Both passes go through the frozen layers and stop by at the values of attention: what a source adds to them, and what a
target reads of them through each head. Their products over positions are the parts of edges.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local.frozen import RELP, FrozenModel
from saejax.models import decoder
from saejax.models.attention import AttentionTables, attend, attention_weights, whole_prompts
from saejax.models.layers import einsum


class Placed(NamedTuple):
    """Vectors [N, D] at positions [N] of the layers [N] where they are added or read; int32 and fp32."""

    layer_N: np.ndarray
    position_N: np.ndarray
    vector_NxD: np.ndarray

    def chosen(self, places_B: np.ndarray, count: int) -> "Placed":
        """Some of them, filled up to a number with vectors of no layer."""
        room = count - len(places_B)
        layer_B = np.pad(self.layer_N[places_B].astype(np.int32), (0, room), constant_values=-1)
        position_B = np.pad(self.position_N[places_B].astype(np.int32), (0, room))
        return Placed(layer_B, position_B, np.pad(self.vector_NxD[places_B], ((0, room), (0, 0))))


def _at(placed: Placed, layer: jax.Array, length: int) -> jax.Array:
    """The vectors of a layer at their positions, else 0; [N, T, D]."""
    here_NxT = (placed.layer_N == layer)[:, None] & (placed.position_N[:, None] == jnp.arange(length)[None])
    return jnp.where(here_NxT[..., None], placed.vector_NxD[:, None], 0)


@functools.partial(jax.jit, static_argnums=0)
def carry_up(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    skip_DxD: jax.Array | None,
    entries: Placed,
    change_SxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sources through a layer.

    Args:
      entries: the sources, by the layer whose entering stream they are added to.
      change_SxTxD: what they changed below.

    Returns:
      The changes of the stream leaving the layer [S, T, D], and of the values that its heads mix, [N, S, T, K].
    """

    def frozen_layer(x_TxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        values: list[jax.Array] = []

        def look(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            values.append(v)
            return attend(frozen.config, RELP, q, k, v, tables)

        tables = whole_prompts(frozen.config, len(x_TxD))
        return frozen.layer(params, layer, tables, x_TxD, skip_DxD, look)[0], jnp.swapaxes(values[0], 0, 1)

    entering_SxTxD = change_SxTxD + _at(entries, layer, len(x_TxD))
    along = jax.vmap(lambda change_TxD: jax.jvp(frozen_layer, (x_TxD,), (change_TxD,))[1], out_axes=(0, 1))
    return along(entering_SxTxD)


@functools.partial(jax.jit, static_argnums=0)
def carry_down(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    skip_DxD: jax.Array | None,
    readers: Placed,
    cotangent_RxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Targets down through a layer.

    Args:
      readers: the targets, by the layer whose transcoder reads; of a stream, L + the one that it enters.
      cotangent_RxTxD: of the stream leaving the layer, but for the targets that read it.

    Returns:
      The cotangents of the stream entering it [R, T, D], and of the values by the head that mixes them,
      [N, R, G, T, K].
    """
    config, length = frozen.config, len(x_TxD)
    groups = config.n_heads // config.n_kv_heads

    def frozen_layer(x_TxD: jax.Array, more_NxGxSxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            weights_NxGxTxS = attention_weights(config, RELP, q, k, tables)
            values_NxGxSxK = jnp.swapaxes(v, 0, 1)[:, None] + more_NxGxSxK
            return jnp.moveaxis(einsum("ngts,ngsk->ngtk", weights_NxGxTxS, values_NxGxSxK), 2, 0).reshape(q.shape)

        return frozen.layer(params, layer, whole_prompts(config, length), x_TxD, skip_DxD, add)

    cotangent_RxTxD += _at(readers, config.n_layers + layer + 1, length)
    nothing = jnp.zeros((config.n_kv_heads, groups, length, config.d_head), x_TxD.dtype)
    _, pull = jax.vjp(frozen_layer, x_TxD, nothing)
    down = jax.vmap(lambda cotangent_TxD, read_TxD: pull((cotangent_TxD, read_TxD)), out_axes=(0, 1))
    return down(cotangent_RxTxD, _at(readers, layer, length))


@functools.partial(jax.jit, static_argnums=2)
def through(wanted_NxRxGxTxK: jax.Array, added_NxSxTxK: jax.Array, first: int) -> jax.Array:
    """The part of each pair of target and source that goes through each head, [R, S, N, G].

    Args:
      added_NxSxTxK: at the positions from ``first`` on, which is static.
    """
    return einsum("nrgtk,nstk->rsng", wanted_NxRxGxTxK[:, :, :, first:], added_NxSxTxK)

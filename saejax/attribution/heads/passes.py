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
from saejax.attribution.local.replacement import padded
from saejax.models import decoder
from saejax.models.attention import AttentionTables, attend, attention_weights, whole_prompts
from saejax.models.layers import einsum


class Placed(NamedTuple):
    """Vectors [E, D] of nodes, at positions [E] of the layers [E] where they are added or read; int32 and fp32.

    Attributes:
      node_E: which node each is of, ascending; one has several where it writes to several layers, the lowest first.
    """

    node_E: np.ndarray
    layer_E: np.ndarray
    position_E: np.ndarray
    vector_ExD: np.ndarray

    def chosen(self, nodes_B: np.ndarray, count: int) -> "Placed":
        """Those of some nodes, which are numbered anew, filled up with vectors of no layer.

        Args:
          nodes_B: the nodes.
          count: to a multiple of which number of vectors.
        """
        number_N = np.full(self.node_E[-1] + 1, -1, np.int32)
        number_N[nodes_B] = np.arange(len(nodes_B))
        number_E = number_N[self.node_E]
        own = np.flatnonzero(number_E >= 0)
        room = padded(len(own), count) - len(own)
        return Placed(
            np.pad(number_E[own], (0, room)),
            np.pad(self.layer_E[own].astype(np.int32), (0, room), constant_values=-1),
            np.pad(self.position_E[own].astype(np.int32), (0, room)),
            np.pad(self.vector_ExD[own], ((0, room), (0, 0))),
        )


def _with(placed: Placed, layer: jax.Array, x_NxTxD: jax.Array) -> jax.Array:
    """With the vectors of a layer added to their nodes at their positions."""
    vector_ExD = jnp.where((placed.layer_E == layer)[:, None], placed.vector_ExD, 0)
    return x_NxTxD.at[placed.node_E, placed.position_E].add(vector_ExD)


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
      frozen: static.
      layer: its number.
      x_TxD: the stream entering it, that of the prompt.
      skip_DxD: the skip path of its transcoder; None: there is none.
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

    along = jax.vmap(lambda change_TxD: jax.jvp(frozen_layer, (x_TxD,), (change_TxD,))[1], out_axes=(0, 1))
    return along(_with(entries, layer, change_SxTxD))


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
      frozen: static.
      layer: its number.
      x_TxD: the stream entering it, that of the prompt.
      skip_DxD: the skip path of its transcoder; None: there is none.
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

    cotangent_RxTxD = _with(readers, config.n_layers + layer + 1, cotangent_RxTxD)
    nothing = jnp.zeros((config.n_kv_heads, groups, length, config.d_head), x_TxD.dtype)
    _, pull = jax.vjp(frozen_layer, x_TxD, nothing)
    down = jax.vmap(lambda cotangent_TxD, read_TxD: pull((cotangent_TxD, read_TxD)), out_axes=(0, 1))
    return down(cotangent_RxTxD, _with(readers, layer, jnp.zeros_like(cotangent_RxTxD)))


@functools.partial(jax.jit, static_argnums=2)
def through(wanted_NxRxGxTxK: jax.Array, added_NxSxXxK: jax.Array, first: int) -> jax.Array:
    """The part of each pair of target and source that goes through each head, [R, S, N, G].

    Args:
      wanted_NxRxGxTxK: what targets read of the values, from ``carry_down``; at the positions up to their last.
      added_NxSxXxK: what sources add to them, from ``carry_up``, at the positions from ``first`` on, which is static.
    """
    end = wanted_NxRxGxTxK.shape[3]
    return einsum("nrgtk,nstk->rsng", wanted_NxRxGxTxK[:, :, :, first:], added_NxSxXxK[:, :, : end - first])

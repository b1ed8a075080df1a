"""The programs that find which heads carry edges: sources up through the layers, targets down, and their products.

Both passes go through the frozen layers and stop by at the values of attention: what a source adds to them, and what a
target reads of them through each head. Their products over positions are the parts of edges.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.local.frozen import RELP, FrozenModel
from saejax.models import decoder
from saejax.models.attention import AttentionTables, attention_weights, whole_prompts
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

    def chosen(self, nodes_B: np.ndarray) -> "Placed":
        """Those of some nodes, which are numbered anew."""
        number_N = np.full(self.node_E[-1] + 1, -1)
        number_N[nodes_B] = np.arange(len(nodes_B))
        own = np.flatnonzero(number_N[self.node_E] >= 0)
        return Placed(number_N[self.node_E[own]], self.layer_E[own], self.position_E[own], self.vector_ExD[own])

    def at(self, layer: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The vectors that nodes have at a layer [N, D], 0 of those without, and the positions of all [N], filled up.

        Args:
          count: N.
        """
        vector_NxD, position_N = np.zeros((count, self.vector_ExD.shape[1]), np.float32), np.zeros(count, np.int32)
        own = np.flatnonzero(self.layer_E == layer)
        vector_NxD[self.node_E[own]], position_N[self.node_E] = self.vector_ExD[own], self.position_E
        return vector_NxD, position_N


def _with(x_NxTxD: jax.Array, vector_NxD: jax.Array, position_N: jax.Array) -> jax.Array:
    """With a vector added to each at its position."""
    return x_NxTxD.at[jnp.arange(len(x_NxTxD)), position_N].add(vector_NxD)


def _entering(
    layer: jax.Array, stream_LxTxD: jax.Array, skip_LxDxD: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The stream entering a layer, that of the prompt, and the skip path of the layer's transcoder."""
    skip_DxD = None if skip_LxDxD is None else lax.dynamic_index_in_dim(skip_LxDxD, layer, keepdims=False)
    return lax.dynamic_index_in_dim(stream_LxTxD, layer, keepdims=False), skip_DxD


@functools.partial(jax.jit, static_argnums=0)
def carry_up(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    stream_LxTxD: jax.Array,
    skip_LxDxD: jax.Array | None,
    added_SxD: jax.Array,
    position_S: jax.Array,
    change_SxXxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sources through a layer, at its last X positions, before which they change nothing.

    Args:
      frozen: static.
      layer: its number.
      stream_LxTxD: the streams entering all layers, those of the prompt.
      skip_LxDxD: skip paths of the transcoders; None: there are none.
      added_SxD: what the sources add to the stream entering the layer.
      position_S: where, of all T.
      change_SxXxD: what they changed below.

    Returns:
      The changes of the stream leaving the layer [S, X, D], and of the values that its heads mix, [N, X, K, S].
    """
    config, (x_TxD, skip_DxD) = frozen.config, _entering(layer, stream_LxTxD, skip_LxDxD)
    first = len(x_TxD) - change_SxXxD.shape[1]
    seen: list[jax.Array] = []

    def weigh(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
        seen.append(attention_weights(config, RELP, q, k, tables))
        return jnp.zeros_like(q)  # what comes after is not asked for

    frozen.layer(params, layer, whole_prompts(config, len(x_TxD)), x_TxD, None, weigh)
    weights_NxGxXxX = seen[0][:, :, first:, first:]

    def last_positions(x_XxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is left of the layer there: of all positions its attention weights alone depend."""
        values: list[jax.Array] = []

        def mix(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            values.append(v)
            return einsum("ngts,snk->tngk", weights_NxGxXxX, v).reshape(q.shape)

        tables = whole_prompts(config, len(x_XxD))  # of other positions: they make the weights, which are known
        return frozen.layer(params, layer, tables, x_XxD, skip_DxD, mix)[0], jnp.swapaxes(values[0], 0, 1)

    change_SxXxD = _with(change_SxXxD, added_SxD, jnp.maximum(position_S - first, 0))
    along = jax.vmap(lambda change_XxD: jax.jvp(last_positions, (x_TxD[first:],), (change_XxD,))[1], out_axes=(0, 3))
    return along(change_SxXxD)


@functools.partial(jax.jit, static_argnums=0)
def carry_down(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    stream_LxTxD: jax.Array,
    skip_LxDxD: jax.Array | None,
    streamed_RxD: jax.Array,
    read_RxD: jax.Array,
    position_R: jax.Array,
    cotangent_RxXxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Targets down through a layer, at its first X positions, after which they read nothing.

    Args:
      frozen: static.
      layer: its number.
      stream_LxTxD: the streams entering all layers, those of the prompt.
      skip_LxDxD: skip paths of the transcoders; None: there are none.
      streamed_RxD, read_RxD: what the targets read of the stream leaving the layer, and behind its transcoder.
      position_R: where.
      cotangent_RxXxD: of the stream leaving the layer, but for the targets that read it.

    Returns:
      The cotangents of the stream entering it [R, X, D], and of the values by the head that mixes them,
      [N, R, G, T, K], 0 after the first X positions.
    """
    config, (x_TxD, skip_DxD) = frozen.config, _entering(layer, stream_LxTxD, skip_LxDxD)
    length = cotangent_RxXxD.shape[1]
    groups = config.n_heads // config.n_kv_heads

    def frozen_layer(x_XxD: jax.Array, more_NxGxXxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            weights_NxGxXxX = attention_weights(config, RELP, q, k, tables)
            values_NxGxXxK = jnp.swapaxes(v, 0, 1)[:, None] + more_NxGxXxK
            return _mixed(weights_NxGxXxX, values_NxGxXxK).reshape(q.shape)

        return frozen.layer(params, layer, whole_prompts(config, length), x_XxD, skip_DxD, add)

    nothing = jnp.zeros((config.n_kv_heads, groups, length, config.d_head), x_TxD.dtype)
    _, pull = jax.vjp(frozen_layer, x_TxD[:length], nothing)
    down = jax.vmap(lambda cotangent_XxD, read_XxD: pull((cotangent_XxD, read_XxD)), out_axes=(0, 1))
    read_RxXxD = _with(jnp.zeros_like(cotangent_RxXxD), read_RxD, position_R)
    below_RxXxD, wanted_NxRxGxXxK = down(_with(cotangent_RxXxD, streamed_RxD, position_R), read_RxXxD)
    return below_RxXxD, jnp.pad(wanted_NxRxGxXxK, ((0, 0),) * 3 + ((0, len(x_TxD) - length), (0, 0)))


@jax.custom_vjp
def _mixed(weights_NxGxXxS: jax.Array, values_NxGxSxK: jax.Array) -> jax.Array:
    """The mean of the values of each head with given weights, [X, N, G, K]."""
    return einsum("ngxs,ngsk->xngk", weights_NxGxXxS, values_NxGxSxK)


def _mixed_back(weights_NxGxXxS: jax.Array, cotangent_XxNxGxK: jax.Array) -> tuple[None, jax.Array]:
    # As in ``frozen``: of a second operand XLA:CPU moves runs of K numbers, of a first one single numbers.
    dimensions = ((2,), (0,)), ((0, 1), (1, 2))
    return None, lax.dot_general(weights_NxGxXxS, cotangent_XxNxGxK, dimensions, precision="highest")


_mixed.defvjp(lambda weights, values: (_mixed(weights, values), weights), _mixed_back)


@functools.partial(jax.jit, static_argnums=3)
def through(wanted_NxRxGxTxK: jax.Array, added_NxXxKxS: jax.Array, end: jax.Array, parts: int) -> jax.Array:
    """The part of each pair of target and source that goes through each head, [N, R, G, S].

    What is summed over comes last on the left and first on the right: XLA:CPU turns over what comes otherwise.

    Args:
      wanted_NxRxGxTxK: what targets read of the values, from ``carry_down``.
      added_NxXxKxS: what sources add to them, from ``carry_up``, at the last X positions.
      end: the position from which on targets read nothing, at the end of one of ``parts`` equal parts of the prompt.
      parts: static; sources begin where one of them does.
    """
    *sizes, length, _ = wanted_NxRxGxTxK.shape
    first, step = length - added_NxXxKxS.shape[1], length // parts

    def add(part: jax.Array, sum_NxRxGxS: jax.Array) -> jax.Array:
        wanted_NxRxGxQxK = lax.dynamic_slice_in_dim(wanted_NxRxGxTxK, first + part * step, step, 3)
        added_NxQxKxS = lax.dynamic_slice_in_dim(added_NxXxKxS, part * step, step, 1)
        return sum_NxRxGxS + einsum("nrgqk,nqks->nrgs", wanted_NxRxGxQxK, added_NxQxKxS)

    nothing = jnp.zeros((*sizes, added_NxXxKxS.shape[3]), wanted_NxRxGxTxK.dtype)
    return lax.fori_loop(0, (end - first) // step, add, nothing)

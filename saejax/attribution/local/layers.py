"""Jitted programs of one layer: the model's layer with values frozen, and both directions of its linear part."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from saejax.attribution.local.frozen import RELP, FrozenModel
from saejax.models import decoder
from saejax.models.attention import AttentionTables, attend, attention_weights, whole_prompt_tables
from saejax.models.config import RunRules
from saejax.models.layers import einsum

FREEZE_MODES = ("none", "attention", "all", "constrained")
# Modes in which an MLP gives what it gave in the prompt, so that activations are those of the prompt.
FIXED = ("all", "constrained")


@functools.partial(jax.jit, static_argnums=0)
def embed(frozen: FrozenModel, params: decoder.Params, ids_T: jax.Array) -> jax.Array:
    """Return the stream entering layer 0, fp32 [T, D]: it stays fp32 in all layers, whatever the weights are."""
    x_TxD = decoder.embed(frozen.config, params, ids_T)
    return x_TxD.astype(jnp.promote_types(x_TxD.dtype, jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(
    frozen: FrozenModel,
    freeze: str,
    params: decoder.Params,
    layer: jax.Array,
    x_BxTxD: jax.Array,
    skip_DxD: jax.Array | None = None,
    frozen_until: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run a layer on a batch whose first row is the prompt itself.

    Args:
      frozen: the model (static).
      freeze: what stays as it is in the first row, one of ``FREEZE_MODES`` (static).
      params: of the model.
      layer: its number.
      x_BxTxD: the streams entering it.
      skip_DxD: the skip path of its transcoder, the only part of a fixed MLP output that reacts; None: there is none.
      frozen_until: attention is frozen at positions before this one.

    Returns:
      The streams leaving it, what its transcoder reads, and what its MLP adds, each [B, T, D].
    """
    # With everything frozen, norm scales are those of the first row, too.
    config, rules = frozen.config, RunRules(first_fixes=freeze == "all")
    seen: dict[str, jax.Array] = {}

    def hook(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        if kind == "mlp_out" and freeze in FIXED:
            read_BxTxD = frozen.read(params, layer, seen, rules)
            change = 0 if skip_DxD is None else einsum("btd,de->bte", read_BxTxD - read_BxTxD[:1], skip_DxD)
            # Each run gets the prompt's MLP output, which is that of the first row.
            value_BxTxD = jnp.broadcast_to(value_BxTxD[:1], value_BxTxD.shape) + change
        seen[kind] = value_BxTxD
        return value_BxTxD

    def attend_as_prompt(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
        # Weights of the first row with the row's own values: what a token attends to is frozen, not what it finds
        # there.
        first_q, first_k = (jnp.broadcast_to(part[:1], part.shape) for part in (q, k))
        frozen_T = jnp.arange(x_BxTxD.shape[1]) < frozen_until
        as_prompt = attend(config, rules, first_q, first_k, v, tables)
        # Both are computed where new tokens follow a frozen prompt; a position takes one of them.
        return jnp.where(frozen_T[None, :, None, None], as_prompt, attend(config, rules, q, k, v, tables))

    function = attend_as_prompt if freeze in ("attention", "constrained") else None
    tables = whole_prompt_tables(config, x_BxTxD.shape[1])
    leaving_BxTxD = decoder.run_layer(config, rules, params, layer, x_BxTxD, tables, hook, function)
    return leaving_BxTxD, frozen.read(params, layer, seen, rules), seen["mlp_out"]


@functools.partial(jax.jit, static_argnums=0)
def read_out(
    frozen: FrozenModel, params: decoder.Params, x_TxD: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return, of the stream ``x_TxD``, its value at the position ``last`` [D], and the logits there [V]."""
    last_1xD = lax.dynamic_slice_in_dim(x_TxD, last, 1)
    return last_1xD[0], decoder.unembed(frozen.config, params, last_1xD, RELP)[0]


@functools.partial(jax.jit, static_argnums=0)
def run_biases(
    frozen: FrozenModel, params: decoder.Params, stream_LxTxD: jax.Array, skip_LxDxD: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return ``FrozenModel.biases`` of all layers, both [L, T, D].

    Args:
      frozen: the model (static).
      params: its parameters.
      stream_LxTxD: the prompt's stream entering each layer.
      skip_LxDxD: skip paths of the transcoders; None: there are none.
    """
    tables = whole_prompt_tables(frozen.config, stream_LxTxD.shape[1])

    def step(_: None, part: tuple[Any, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        layer, x_TxD, skip_DxD = part
        return None, frozen.biases(params, layer, tables, x_TxD, skip_DxD)

    layers = jnp.arange(frozen.config.n_layers)
    return lax.scan(step, None, (layers, stream_LxTxD, skip_LxDxD))[1]


@functools.partial(jax.jit, static_argnums=0)
def push_layer(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    skip_DxD: jax.Array | None,
    change_SxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Push changes of the stream through the linear part of a layer.

    Args:
      frozen: the model (static).
      params: of the model.
      layer: its number.
      x_TxD: the prompt's stream entering the layer.
      skip_DxD: skip path of its transcoder; None: there is none.
      change_SxTxD: changes of that stream.

    Returns:
      The changes of the stream leaving it [S, T, D], and of the values that its heads mix [N, T, K, S].
    """
    open_layer = _open_layer(frozen, params, layer, skip_DxD)
    none = _no_values(frozen, x_TxD)
    along = jax.vmap(
        lambda change_TxD: jax.jvp(lambda x: open_layer(x, none), (x_TxD,), (change_TxD,))[1], out_axes=(0, 0, 3)
    )
    leaving_SxTxD, _, values_NxTxKxS = along(change_SxTxD)
    return leaving_SxTxD, values_NxTxKxS


@functools.partial(jax.jit, static_argnums=0)
def pull_layer(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    skip_DxD: jax.Array | None,
    leaving_RxTxD: jax.Array,
    read_RxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Pull cotangents back through the linear part of a layer.

    Args:
      frozen: the model (static).
      params: of the model.
      layer: its number.
      x_TxD: the prompt's stream entering the layer.
      skip_DxD: skip path of its transcoder; None: there is none.
      leaving_RxTxD: cotangents of the stream leaving it.
      read_RxTxD: cotangents of what its transcoder reads.

    Returns:
      The cotangents of the stream entering it [R, T, D], and of the values by the head that mixes them,
      [N, R, G, T, K].
    """
    open_layer = _open_layer(frozen, params, layer, skip_DxD)
    (_, _, values_NxTxK), pull = jax.vjp(open_layer, x_TxD, _no_values(frozen, x_TxD))
    no_values = jnp.zeros_like(values_NxTxK)
    down = jax.vmap(lambda leaving, read: pull((leaving, read, no_values)), out_axes=(0, 1))
    return down(leaving_RxTxD, read_RxTxD)


def _open_layer(frozen: FrozenModel, params: decoder.Params, layer: jax.Array, skip_DxD: jax.Array | None) -> Any:
    """Return the frozen layer with its values open: (stream, added values) to (leaving, read, values)."""

    # What is added is zero; its cotangent is what the path through each head carries.
    def open_layer(x_TxD: jax.Array, added_NxGxTxK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        values: list[jax.Array] = []

        def mix(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            weights_NxGxTxS = attention_weights(frozen.config, RELP, q, k, tables)
            values.append(jnp.swapaxes(v, 0, 1))
            mixed_TxNxGxK = einsum("ngts,ngsk->tngk", weights_NxGxTxS, values[0][:, None] + added_NxGxTxK)
            return mixed_TxNxGxK.reshape(q.shape)

        tables = whole_prompt_tables(frozen.config, len(x_TxD))
        leaving_TxD, read_TxD = frozen.layer(params, layer, tables, x_TxD, skip_DxD, mix)
        return leaving_TxD, read_TxD, values[0]

    return open_layer


def _no_values(frozen: FrozenModel, x_TxD: jax.Array) -> jax.Array:
    config = frozen.config
    groups = config.n_heads // config.n_kv_heads
    return jnp.zeros((config.n_kv_heads, groups, len(x_TxD), config.d_head), x_TxD.dtype)

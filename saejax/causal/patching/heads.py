"""Queries, keys, values and outputs of attention heads at single positions: estimates of all effects, some exact.

A *node* is one of these vectors in one layer, of one head, at one position. Patching it puts the counterpart's vector
into the prompt's run (noising); its effect is by how much the logit difference falls.

AtP estimates it by the change of the vector times the gradient in it. That misses nodes where attention is saturated:
where a softmax has nothing to gain or lose at the clean point, the gradient in its query and key is nearly zero, but
another query or key moves all of the attention. AtP* (Kramar et al., 2024, arXiv 2403.00745) corrects two such cases:

- the *QK fix*: for queries and keys the attention weights are computed anew, and only what follows them is linear:
  the sum over queries t and keys s of (a'_ts - a_ts) <v_s, dL/dz_t>,
  with z the head's output. (The paper's shortcut for keys divides by what a saturated weight leaves of 1, of which
  fp32 keeps nothing: here the softmax is computed anew, too.)

- *GradDrop*: a node's direct and indirect effects may cancel. The gradient is taken once for each layer with nothing
  flowing back through what that layer adds to the stream, and the sizes of the L estimates are added up and divided by
  L - 1 (a node's own layer gives none).

Features of a dictionary at one site have no query or key of their own, so that the QK fix does not apply to them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saejax.models import decoder
from saejax.models.attention import QKV, Attend, AttentionSpec, AttentionTables, Layer, attend, whole_prompt_tables
from saejax.models.config import GRADIENT, DecoderConfig
from saejax.models.decoder import run_layers

NODES = ("query", "key", "value", "output")
_NOTHING = -1  # the layer through which nothing flows back


class Heads(NamedTuple):
    """Of every layer queries and outputs [L, B, T, H, K], keys and values [L, B, T, N, K]; or gradients in them."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    output: jax.Array

    @classmethod
    def zeros(cls, config: DecoderConfig, shape: tuple[int, ...], dtype: jnp.dtype) -> "Heads":
        heads = config.n_heads, config.n_kv_heads, config.n_kv_heads, config.n_heads
        return cls(*(jnp.zeros((config.n_layers, *shape, count, config.d_head), dtype) for count in heads))


class NodePatch(NamedTuple):
    """One node of each of R rows, and what is put there.

    Attributes:
      node_R: its place in ``NODES``.
      layer_R, head_R, position_R: where it is.
      vector_RxK: what is put there.
    """

    node_R: jax.Array
    layer_R: jax.Array
    head_R: jax.Array
    position_R: jax.Array
    vector_RxK: jax.Array

    def put(self, node: str, layer: Layer, x_RxTxHxK: jax.Array) -> jax.Array:
        """The vectors x of all heads with the patch of the rows whose node is here."""
        here_R = (self.node_R == NODES.index(node)) & (self.layer_R == layer)
        at_RxT = jnp.arange(x_RxTxHxK.shape[1])[None, :] == self.position_R[:, None]
        of_RxH = jnp.arange(x_RxTxHxK.shape[2])[None, :] == self.head_R[:, None]
        where_RxTxH = here_R[:, None, None] & at_RxT[:, :, None] & of_RxH[:, None, :]
        return jnp.where(where_RxTxH[..., None], self.vector_RxK[:, None, None, :].astype(x_RxTxHxK.dtype), x_RxTxHxK)


@functools.partial(jax.jit, static_argnums=0)
def record_heads(config: DecoderConfig, params: decoder.Params, ids_BxT: jax.Array) -> Heads:
    """The vectors of all nodes without a patch."""

    def keep(plain: Attend, layer: Layer, qkv: QKV, kept: Heads) -> tuple[jax.Array, Heads]:
        z = plain(*qkv)
        return z, jax.tree.map(lambda every, own: every.at[layer].set(own), kept, Heads(*qkv, z))

    x_BxTxD = decoder.embed(config, params, ids_BxT)
    kept = Heads.zeros(config, ids_BxT.shape, x_BxTxD.dtype)
    attention = AttentionSpec(whole_prompt_tables(config, ids_BxT.shape[1]), keep, kept)
    return run_layers(config, params, x_BxTxD, 0, config.n_layers, attention=attention).carried


@functools.partial(jax.jit, static_argnums=0)
def patch_nodes(
    config: DecoderConfig,
    params: decoder.Params,
    ids_RxT: jax.Array,
    last_R: jax.Array,
    answers_Rx2: jax.Array,
    patch: NodePatch,
) -> jax.Array:
    """The logit difference of each row with its node patched, fp32 [R]; tokens and answers as ``Pairs`` has them."""

    def patched(plain: Attend, layer: Layer, qkv: QKV, carried: tuple) -> tuple[jax.Array, tuple]:
        changed = [patch.put(node, layer, own) for node, own in zip(NODES, qkv, strict=False)]
        return patch.put("output", layer, plain(*changed)), carried

    attention = AttentionSpec(whole_prompt_tables(config, ids_RxT.shape[1]), patched)
    return _difference(config, params, ids_RxT, last_R, answers_Rx2, attention, _NOTHING)


def _difference(
    config: DecoderConfig,
    params: decoder.Params,
    ids_BxT: jax.Array,
    last_B: jax.Array,
    answers_Bx2: jax.Array,
    attention: AttentionSpec,
    dropped: int | jax.Array,
) -> jax.Array:
    """The logit difference [B]; no gradient flows back through what the dropped layer adds to the stream."""

    def drop(kind: str, layer: Layer, value: jax.Array) -> jax.Array:
        if kind not in ("attn_out", "mlp_out"):
            return value
        return jnp.where(layer == dropped, jax.lax.stop_gradient(value), value)

    x_BxTxD = decoder.embed(config, params, ids_BxT)
    hook_layers = () if isinstance(dropped, int) else None
    x_BxTxD = run_layers(config, params, x_BxTxD, 0, config.n_layers, drop, hook_layers, attention=attention).x
    return answer_difference(config, params, x_BxTxD, last_B, answers_Bx2)


def answer_difference(
    config: DecoderConfig, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
) -> jax.Array:
    """The logit difference of the two answers, of the stream x that leaves the last layer, fp32 [B]."""
    last_BxD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]
    logits_BxV = decoder.unembed(config, params, last_BxD)
    own_B, other_B = jnp.take_along_axis(logits_BxV, answers_Bx2, axis=1).T
    return own_B - other_B


@functools.partial(jax.jit, static_argnums=0)
def slopes(
    config: DecoderConfig,
    params: decoder.Params,
    ids_BxT: jax.Array,
    last_B: jax.Array,
    answers_Bx2: jax.Array,
    dropped: jax.Array,
) -> Heads:
    """Gradients of the logit difference in all nodes; tokens and answers as ``Pairs`` has them.

    None flows back through what the ``dropped`` layer adds to the stream; -1 drops no layer.
    """

    def difference(added: Heads) -> jax.Array:
        def shifted(plain: Attend, layer: Layer, qkv: QKV, carried: tuple) -> tuple[jax.Array, tuple]:
            own = [value + every[layer] for value, every in zip(qkv, added, strict=False)]
            return plain(*own) + added.output[layer], carried

        attention = AttentionSpec(whole_prompt_tables(config, ids_BxT.shape[1]), shifted)
        return _difference(config, params, ids_BxT, last_B, answers_Bx2, attention, dropped).sum()

    return jax.grad(difference)(Heads.zeros(config, ids_BxT.shape, params["embed_VxD"].dtype))


class Estimates(NamedTuple):
    """Effects of nodes of each kind, [L, B, T, H or N]: those of ``NODES`` by AtP, then queries and keys fixed."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    output: jax.Array
    query_fixed: jax.Array
    key_fixed: jax.Array

    @property
    def plain(self) -> tuple[jax.Array, ...]:
        """By AtP, in the order of ``NODES``."""
        return self[:4]

    @property
    def fixed(self) -> tuple[jax.Array, ...]:
        """With the QK fix."""
        return self.query_fixed, self.key_fixed, self.value, self.output


@functools.partial(jax.jit, static_argnums=0)
def effects(config: DecoderConfig, clean: Heads, other: Heads, slope: Heads) -> Estimates:
    """What is estimated of every node, given gradients at the clean run; above 0 where the logit difference falls."""
    tables = whole_prompt_tables(config, clean.query.shape[2])

    def of_layer(layer: jax.Array, clean: Heads, other: Heads, slope: Heads) -> Estimates:
        query, key, value, output = (-((b - a) * g).sum(axis=-1) for a, b, g in zip(clean, other, slope, strict=True))
        own = tables.at(config, layer)
        moved = attend(config, GRADIENT, other.query, clean.key, clean.value, own) - clean.output
        query_fixed, key_fixed = -(moved * slope.output).sum(axis=-1), _keys(config, clean, other, slope, own)
        return Estimates(query, key, value, output, query_fixed, key_fixed)

    layers = jnp.arange(config.n_layers)
    return jax.lax.map(lambda one: of_layer(*one), (layers, clean, other, slope))


def _keys(config: DecoderConfig, clean: Heads, other: Heads, slope: Heads, tables: AttentionTables) -> jax.Array:
    """The QK fix of keys in a layer, [B, T, N]: attention is computed with one position's keys changed at a time."""

    def of_position(position: jax.Array) -> jax.Array:
        here_T = jnp.arange(clean.key.shape[1]) == position
        key = jnp.where(here_T[None, :, None, None], other.key, clean.key)
        moved = attend(config, GRADIENT, clean.query, key, clean.value, tables) - clean.output
        fall_BxH = -(moved * slope.output).sum(axis=(1, 3))
        return fall_BxH.reshape(len(fall_BxH), config.n_kv_heads, -1).sum(axis=-1)  # heads that share the key

    return jnp.moveaxis(jax.lax.map(of_position, jnp.arange(clean.key.shape[1])), 0, 1)

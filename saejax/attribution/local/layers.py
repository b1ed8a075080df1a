"""One layer of the local replacement model: what is left of a decoder layer when all that the prompt fixes is frozen.

Attention weights and the factors of norms (1 / root mean square, or 1 / standard deviation) are constants, and what the
MLP adds is a constant too, but for a transcoder's skip path. So a layer is an affine function of the stream that enters
it: its linear part carries an effect up, the transposed one a cause down, its constant part is what biases add.

It is the decoder's own layer, run by the rules ``RELP``: it has the model's values, and
differentiation takes attention weights and factors as constants.

The programs are jitted: the model's layer with values frozen, and both directions of its linear part.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models import decoder
from saejax.models.attention import (
    AttentionFunction,
    AttentionTables,
    TablesByLayer,
    attend,
    attention_weights,
    query_blocks,
    whole_prompt_tables,
)
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.layers import einsum, norm
from saejax.models.parameters import LAYERS

RELP = RunRules(backward="relp")  # attention weights and factors of norms are constant to differentiation
FREEZE_MODES = ("none", "attention", "all", "constrained")
TEXT_MODES = FREEZE_MODES[:2]  # in which new tokens can follow the prompt
# Modes in which an MLP gives its output in the prompt, so that activations stay as in the prompt.
FIXED = ("all", "constrained")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A decoder whose layers are frozen, with the skip paths of its transcoders."""

    config: DecoderConfig = dataclasses.field(metadata=dict(static=True))  #: of the decoder (static)
    params: decoder.Params  #: its parameters
    #: what transcoders read: "mlp_in", what the MLP does; "mlp_normed", the same before the norm's gain; or
    #: "resid_mid", the stream before that norm (static).
    reads: str = dataclasses.field(default="mlp_in", metadata=dict(static=True))
    skip_LxDxD: jax.Array | None = None  #: skip paths of the transcoders, applied as x @ skip; None: there are none

    def skip(self, layer: int | jax.Array, read_xD: jax.Array) -> jax.Array:
        """Return what the skip path of a layer's transcoder gives of what is read, [..., D]."""
        if self.skip_LxDxD is None:
            return jnp.zeros_like(read_xD)
        skip_DxD = lax.dynamic_index_in_dim(self.skip_LxDxD, layer, keepdims=False)
        return einsum("...d,de->...e", read_xD, skip_DxD)

    def layer(
        self,
        layer: int | jax.Array,
        tables: TablesByLayer,
        x_TxD: jax.Array,
        function: AttentionFunction | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the frozen layer.

        Args:
          layer: its number.
          tables: of the prompt.
          x_TxD: the prompt's stream entering the layer: it fixes all constants.
          function: the attention function; None: one that is quick to differentiate backwards, and cannot be forwards.

        Returns:
          The stream leaving the layer without what the MLP adds, unless by the skip path; and what the transcoder
          reads, both [T, D].
        """
        seen: dict[str, jax.Array] = {}

        def hook(kind: str, value_TxD: jax.Array) -> jax.Array:
            seen[kind] = value_TxD
            # What the MLP adds is a source of its own, and no part of the linear layer.
            return value_TxD if kind != "mlp_out" else self.skip(layer, self.read(layer, seen))

        function = function or self._attend
        leaving_TxD = decoder.run_layer(self.config, RELP, self.params, layer, x_TxD, tables, hook, function)
        return leaving_TxD, self.read(layer, seen)

    def _attend(self, q_TxHxK: jax.Array, k_TxNxK: jax.Array, v_TxNxK: jax.Array, tables: AttentionTables) -> jax.Array:
        """Attend as ``attention.attend`` does, with constant weights and a cheap transpose."""
        parts = []
        for queries, keys in query_blocks(len(q_TxHxK), len(k_TxNxK)):
            # The decoder's own blocks, so that values are the model's.
            block = tables.block(queries, keys)
            block_inputs = q_TxHxK[queries], k_TxNxK[keys]
            parts.append(_weighted(attention_weights(self.config, RELP, *block_inputs, block), v_TxNxK[keys]))
        return jnp.concatenate(parts).reshape(q_TxHxK.shape)

    def read(self, layer: int | jax.Array, seen: Mapping[str, jax.Array], rules: RunRules = RELP) -> jax.Array:
        """Return what the transcoder reads, from the values at a layer's sites.

        Args:
          layer: its number.
          seen: values [..., T, D] by kind of site.
          rules: of the run.
        """
        if self.reads == "mlp_in":
            return seen["mlp_in"]
        stream = seen["resid_pre" if self.config.parallel else "resid_mid"]
        if self.reads == "resid_mid":
            return stream
        config, weights = self.config, decoder.layer_params(self.params, layer)
        name = "attn_norm" if config.shared_norm else "mlp_norm"
        gain_D = weights[f"{name}_D"]
        # A gain of 1, which these norms store as 0.
        plain = {f"{name}_D": jnp.full_like(gain_D, 0 if config.norm == "rms_plus_one" else 1)}
        if config.norm == "layer":
            plain[f"{name}_bias_D"] = jnp.zeros_like(gain_D)
        return norm(config, rules, plain, name, stream)


@jax.custom_vjp
def _weighted(weights_NxGxTxS: jax.Array, v_SxNxK: jax.Array) -> jax.Array:
    """Return the mean of the values with given weights, [T, N, G, K]."""
    return einsum("ngts,snk->tngk", weights_NxGxTxS, v_SxNxK)


def _weighted_back(weights_NxGxTxS: jax.Array, cotangent_TxNxGxK: jax.Array) -> tuple[None, jax.Array]:
    # The cotangent is the second operand, which ``einsum`` would not leave to us: with many of them, XLA then brings
    # together runs of K numbers. Of a first operand it moves single numbers, which takes longer than the product.
    summed, batched = ((1, 2), (2, 0)), ((0,), (1,))
    cotangent_NxSxK = lax.dot_general(weights_NxGxTxS, cotangent_TxNxGxK, (summed, batched), precision="highest")
    return None, jnp.swapaxes(cotangent_NxSxK, 0, 1)


_weighted.defvjp(lambda weights, v: (_weighted(weights, v), weights), _weighted_back)


@jax.jit
def embed(frozen: FrozenModel, ids_xT: jax.Array) -> jax.Array:
    """Return the stream entering layer 0, fp32 [..., T, D]: it stays fp32 in all layers, whatever the weights are."""
    x_xTxD = decoder.embed(frozen.config, frozen.params, ids_xT)
    return x_xTxD.astype(jnp.promote_types(x_xTxD.dtype, jnp.float32))


@functools.partial(jax.jit, static_argnums=1)
def run_layer(
    frozen: FrozenModel, freeze: str, layer: jax.Array, x_BxTxD: jax.Array, frozen_until: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run a layer on a batch whose first row is the prompt itself.

    Args:
      frozen: the model.
      freeze: what stays as it is in the first row, one of ``FREEZE_MODES`` (static).
      layer: its number.
      x_BxTxD: the streams entering it.
      frozen_until: attention is frozen at positions before this one.

    Returns:
      The streams leaving it, what its transcoder reads, and what its MLP adds, each [B, T, D].
    """
    # With everything frozen, norm scales come from the first row, too.
    config, rules = frozen.config, RunRules(first_fixes=freeze == "all")
    seen: dict[str, jax.Array] = {}

    def hook(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        if kind == "mlp_out" and freeze in FIXED:
            read_BxTxD = frozen.read(layer, seen, rules)
            # Each run gets the prompt's MLP output, which the first row has; the skip path alone reacts.
            change_BxTxD = frozen.skip(layer, read_BxTxD - read_BxTxD[:1])
            value_BxTxD = jnp.broadcast_to(value_BxTxD[:1], value_BxTxD.shape) + change_BxTxD
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
    leaving_BxTxD = decoder.run_layer(config, rules, frozen.params, layer, x_BxTxD, tables, hook, function)
    return leaving_BxTxD, frozen.read(layer, seen, rules), seen["mlp_out"]


@jax.jit
def run_biases(frozen: FrozenModel, stream_LxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the constant parts of all layers: what biases add to the stream and to what is read, both [L, T, D].

    A constant part is linear in the biases, so it is its own derivative along them. ``stream_LxTxD`` is the prompt's
    stream entering each layer.
    """
    tables = whole_prompt_tables(frozen.config, stream_LxTxD.shape[1])
    biases = layer_biases(frozen.params)
    function = functools.partial(attend, frozen.config, RELP)  # which can be differentiated this way round

    def step(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        layer, x_TxD = part

        def run(biases: decoder.Params) -> tuple[jax.Array, jax.Array]:
            """Run the layer with these biases."""
            changed = dataclasses.replace(frozen, params={**frozen.params, **biases})
            return changed.layer(layer, tables, x_TxD, function)

        return None, jax.jvp(run, (biases,), (biases,))[1]

    return lax.scan(step, None, (jnp.arange(frozen.config.n_layers), stream_LxTxD))[1]


def layer_biases(params: decoder.Params) -> decoder.Params:
    """Return the biases of layers among the parameters of a decoder."""
    return {name: value for name, value in params.items() if name.startswith(LAYERS) and "_bias" in name}

"""One layer of the local replacement model: what is left of a decoder layer when all that the prompt fixes is frozen.

Attention weights and the factors of norms (1 / root mean square, or 1 / standard deviation) are constants, and what the
MLP adds is a constant too, but for a transcoder's skip path. So a layer is an affine function of the stream that enters
it: its linear part carries an effect up, the transposed one a cause down, its constant part is what biases add.

It is the decoder's own layer, run by the rules ``RELP``: values are those of the model, and
differentiation takes attention weights and factors as constants.
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
)
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.layers import einsum, norm
from saejax.models.parameters import LAYERS

RELP = RunRules(backward="relp")  # attention weights and factors of norms are constant to differentiation


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A decoder whose layers are frozen. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
      config: the decoder.
      reads: what transcoders read: "mlp_in", what the MLP does; "mlp_normed", the same before the norm's gain; or
        "resid_mid", the stream before that norm.
    """

    config: DecoderConfig
    reads: str = "mlp_in"

    def layer(
        self,
        params: decoder.Params,
        layer: int | jax.Array,
        tables: TablesByLayer,
        x_TxD: jax.Array,
        skip_DxD: jax.Array | None = None,
        function: AttentionFunction | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the frozen layer.

        Args:
          params: of the model.
          layer: its number.
          tables: of the prompt.
          x_TxD: the stream entering the layer, that of the prompt: it fixes what is constant.
          skip_DxD: skip path of the layer's transcoder, applied as read @ skip.
          function: the attention function; None: one that is quick to differentiate backwards, and cannot be forwards.

        Returns:
          The stream leaving the layer without what the MLP adds, unless by the skip path; and what the transcoder
          reads, both [T, D].
        """
        seen: dict[str, jax.Array] = {}

        def hook(kind: str, value_TxD: jax.Array) -> jax.Array:
            seen[kind] = value_TxD
            # What the MLP adds is a source of its own, and no part of the linear layer.
            if kind != "mlp_out":
                return value_TxD
            read_TxD = self.read(params, layer, seen)
            return jnp.zeros_like(value_TxD) if skip_DxD is None else einsum("td,de->te", read_TxD, skip_DxD)

        leaving_TxD = decoder.run_layer(self.config, RELP, params, layer, x_TxD, tables, hook, function or self._attend)
        return leaving_TxD, self.read(params, layer, seen)

    def _attend(self, q_TxHxK: jax.Array, k_TxNxK: jax.Array, v_TxNxK: jax.Array, tables: AttentionTables) -> jax.Array:
        """Attend as ``attention.attend`` does, with constant weights and a cheap transpose."""
        parts = []
        for queries, keys in query_blocks(len(q_TxHxK), len(k_TxNxK)):
            # The decoder's own blocks, so that values are the model's.
            block = tables._replace(mask=tables.mask[queries, keys])
            block_inputs = q_TxHxK[queries], k_TxNxK[keys]
            parts.append(_weighted(attention_weights(self.config, RELP, *block_inputs, block), v_TxNxK[keys]))
        return jnp.concatenate(parts).reshape(q_TxHxK.shape)

    def read(
        self,
        params: decoder.Params,
        layer: int | jax.Array,
        seen: Mapping[str, jax.Array],
        rules: RunRules = RELP,
    ) -> jax.Array:
        """Return what the transcoder reads, from the values at a layer's sites.

        Args:
          params: of the model.
          layer: its number.
          seen: values [..., T, D] by kind of site.
          rules: of the run.
        """
        if self.reads == "mlp_in":
            return seen["mlp_in"]
        stream = seen["resid_pre" if self.config.parallel else "resid_mid"]
        if self.reads == "resid_mid":
            return stream
        config, weights = self.config, decoder.layer_params(params, layer)
        name = "attn_norm" if config.shared_norm else "mlp_norm"
        gain_D = weights[f"{name}_D"]
        # A gain of 1, which these norms store as 0.
        plain = {f"{name}_D": jnp.full_like(gain_D, 0 if config.norm == "rms_plus_one" else 1)}
        if config.norm == "layer":
            plain[f"{name}_bias_D"] = jnp.zeros_like(gain_D)
        return norm(config, rules, plain, name, stream)

    def biases(
        self,
        params: decoder.Params,
        layer: int | jax.Array,
        tables: TablesByLayer,
        x_TxD: jax.Array,
        skip_DxD: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the constant part of ``layer``, both [T, D]: what its biases add to the stream and to what is read.

        It is linear in the biases, so it is its own derivative along them.

        Args:
          params: of the model.
          layer: its number.
          tables: of the prompt.
          x_TxD: the stream entering the layer, that of the prompt.
          skip_DxD: skip path of the layer's transcoder; None: there is none.
        """
        bias_params = {name: value for name, value in params.items() if name.startswith(LAYERS) and "_bias" in name}

        def with_biases(biases: decoder.Params) -> tuple[jax.Array, jax.Array]:
            function = functools.partial(attend, self.config, RELP)  # which can be differentiated this way round
            return self.layer({**params, **biases}, layer, tables, x_TxD, skip_DxD, function)

        return jax.jvp(with_biases, (bias_params,), (bias_params,))[1]


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

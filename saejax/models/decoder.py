"""The decoder's parts: pure functions of a configuration, rules, parameters and token ids. ``run`` runs its layers.

Shapes: B prompts, T tokens, D ``d_model``, H query heads, N key-value heads, G = H/N, K head width, F MLP width,
V vocabulary, C context, L layers. Prompts are padded on the right: attention is causal, so padding never reaches a
real position; with a cache they are padded on the left (see ``cache``). Everything works under ``jax.jit``,
``jax.vmap`` and ``jax.grad``, in the dtype of the parameters; norms, rotary angles, softmax and logits are computed in
fp32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.attention import AttentionFunction, attention
from saejax.models.attention_tables import TablesByLayer
from saejax.models.config import DecoderConfig
from saejax.models.layers import einsum, like, mlp, norm, soft_cap
from saejax.models.parameters import LAYERS
from saejax.models.rules import GRADIENT, RunRules

Params = Mapping[str, Any]
LayerHook = Callable[[str, jax.Array], jax.Array]  # of a kind of site and its value there: what the layer goes on with


def embed(config: DecoderConfig, params: Params, ids_xT: jax.Array, positions_xT: jax.Array | None = None) -> jax.Array:
    """The residual stream entering layer 0, [..., T, D].

    Args:
      ids_xT: int32 token ids.
      positions_xT: for families with learned positions; None: 0 to T-1.
    """
    x_xTxD = params["embed_VxD"][ids_xT]
    if config.embed_scale != 1:
        # The factor in the stream's dtype: these models are trained with what bfloat16 makes of it.
        x_xTxD = x_xTxD * jnp.asarray(config.embed_scale, x_xTxD.dtype)
    if config.learned_positions:
        positions = jnp.arange(ids_xT.shape[-1]) if positions_xT is None else positions_xT
        x_xTxD = x_xTxD + like(params["position_CxD"][positions], x_xTxD)
    return x_xTxD


def unembed(config: DecoderConfig, params: Params, x_xD: jax.Array, rules: RunRules = GRADIENT) -> jax.Array:
    """Final norm and head: logits [..., V] in fp32 of the stream leaving the last layer."""
    x_xD = norm(config, rules, params, "final_norm", x_xD)
    name, pattern = ("embed_VxD", "...d,vd->...v") if config.tied else ("unembed_DxV", "...d,dv->...v")
    logits_xV = einsum(pattern, x_xD, params[name])
    if config.unembed_bias:
        logits_xV = logits_xV + like(params["unembed_bias_V"], logits_xV)
    return soft_cap(logits_xV, config.logit_cap)


def head_of(config: DecoderConfig, params: Params, ids_N: jax.Array) -> Params:
    """Parameters with which ``unembed`` gives the logits of these ids only, [B, T, N]."""
    name, axis = ("embed_VxD", 0) if config.tied else ("unembed_DxV", 1)
    part = {name: jnp.take(params[name], ids_N, axis=axis)}
    if config.unembed_bias:
        part["unembed_bias_V"] = params["unembed_bias_V"][ids_N]
    return {**params, **part}


def run_layer(
    config: DecoderConfig,
    rules: RunRules,
    params: Params,
    layer: int | jax.Array,
    x_xTxD: jax.Array,
    tables: TablesByLayer,
    hook: LayerHook,
    function: AttentionFunction | None = None,
) -> jax.Array:
    """One layer.

    Args:
      layer: its number, which may be known only when the program runs.
      x_xTxD: the stream entering it.
      tables: masks and rotary tables of all layers.
      hook: called while tracing, at each of the layer's sites in their order, with its kind and its value [B, T, D];
        the layer goes on with what it returns.
      function: the attention function; None: the tokens attend to one another.

    Returns:
      The stream leaving it, [B, T, D].
    """
    weights = layer_params(params, layer)
    before_xTxD = hook("resid_pre", x_xTxD)
    normed_xTxD = norm(config, rules, weights, "attn_norm", before_xTxD)
    out_xTxD = attention(config, rules, weights, normed_xTxD, tables.at(config, layer), function)
    if config.post_norms:
        out_xTxD = norm(config, rules, weights, "attn_post_norm", out_xTxD)
    x_xTxD = hook("resid_mid", before_xTxD + hook("attn_out", out_xTxD))
    if not config.shared_norm:
        normed_xTxD = norm(config, rules, weights, "mlp_norm", before_xTxD if config.parallel else x_xTxD)
    out_xTxD = mlp(config, rules, weights, hook("mlp_in", normed_xTxD))
    if config.post_norms:
        out_xTxD = norm(config, rules, weights, "mlp_post_norm", out_xTxD)
    return hook("resid_post", x_xTxD + hook("mlp_out", out_xTxD))


def layer_params(params: Params, layer: int | jax.Array) -> dict[str, jax.Array]:
    """One layer's parameters, by their names without "layers."."""
    return {
        name.removeprefix(LAYERS): _layer_of(value, layer) for name, value in params.items() if name.startswith(LAYERS)
    }


def _layer_of(stacked: jax.Array, layer: int | jax.Array) -> jax.Array:
    """One layer of a parameter.

    XLA:CPU slices bfloat16 in fp32. Tied to the layer's number, only the slice is widened; otherwise, before the scan,
    all layers are, which costs their memory twice over and a tenth of the time of a batch of 2,000 tokens.
    """
    if stacked.dtype == jnp.bfloat16 and not isinstance(layer, int):
        stacked, layer = lax.optimization_barrier((stacked, layer))
    return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)

"""The decoder: pure functions of a configuration, parameters and token ids.

Shapes: B prompts, T tokens, D ``d_model``, H query heads, N key-value heads, G = H/N, K head width, F MLP width,
V vocabulary, C context, L layers. Prompts are padded on the right: attention is causal, so padding never reaches a
real position; with a cache they are padded on the left (see ``incremental``). Everything works under ``jax.jit``,
``jax.vmap`` and ``jax.grad``, in the dtype of the parameters; norms, rotary angles, softmax and logits are computed in
fp32.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.attention import Meet, Reaches, attention, full_reaches
from saejax.models.config import DecoderConfig
from saejax.models.layers import einsum, like, mlp, norm, soft_cap
from saejax.models.parameters import LAYERS
from saejax.models.sites import Site

Params = Mapping[str, Any]
Hook = Callable[[Site, jax.Array], jax.Array]
LayerHook = Callable[[str, jax.Array], jax.Array]


def embed(
    config: DecoderConfig, params: Params, ids_BxT: jax.Array, positions_BxT: jax.Array | None = None
) -> jax.Array:
    """The residual stream entering layer 0, [B, T, D].

    Args:
      positions_BxT: for families with learned positions; None: 0 to T-1.
    """
    x_BxTxD = params["embed_VxD"][ids_BxT]
    if config.embed_scale != 1:
        # The factor in the stream's dtype: these models are trained with what bfloat16 makes of it.
        x_BxTxD = x_BxTxD * jnp.asarray(config.embed_scale, x_BxTxD.dtype)
    if config.learned_positions:
        positions = jnp.arange(ids_BxT.shape[-1]) if positions_BxT is None else positions_BxT
        x_BxTxD = x_BxTxD + like(params["position_CxD"][positions], x_BxTxD)
    return x_BxTxD


def run_layers(
    config: DecoderConfig,
    params: Params,
    x_BxTxD: jax.Array,
    start: int,
    stop: int,
    hook: Hook | None = None,
    hook_layers: Collection[int] = (),
) -> jax.Array:
    """Runs layers ``start`` to ``stop - 1`` on the residual stream that enters layer ``start``.

    So ``run_layers(config, params, x, L + 1, config.n_layers)`` is the rest of the model after ``resid_post.L``.

    Args:
      x_BxTxD: the stream at positions 0 to T-1.
      hook: called while tracing, at every site of the layers in ``hook_layers``, with the site and its value
        [B, T, D]; the model goes on with what it returns.
      hook_layers: these layers are unrolled; all others run in a scan that indexes the stacked parameters.

    Returns:
      The stream leaving layer ``stop - 1``, [B, T, D].
    """
    reaches = full_reaches(config, x_BxTxD.shape[-2])
    if hook is not None:
        for layer in sorted(set(hook_layers) & set(range(start, stop))):
            x_BxTxD, _ = scan_layers(config, params, x_BxTxD, start, layer)
            x_BxTxD = block(config, params, layer, x_BxTxD, reaches, functools.partial(call_hook, hook, layer))
            start = layer + 1
    return scan_layers(config, params, x_BxTxD, start, stop)[0]


def scan_layers(
    config: DecoderConfig, params: Params, x_BxTxD: jax.Array, start: int, stop: int, kinds: Collection[str] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs layers ``start`` to ``stop - 1`` in one scan, whose compile time does not grow with their number.

    Returns:
      The stream leaving layer ``stop - 1``, and for each of ``kinds`` of site its values [stop - start, B, T, D].
    """
    reaches = full_reaches(config, x_BxTxD.shape[-2])

    def body(x_BxTxD: jax.Array, layer: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        kept: dict[str, jax.Array] = {}

        def keep(kind: str, value_BxTxD: jax.Array) -> jax.Array:
            if kind in kinds:
                kept[kind] = value_BxTxD
            return value_BxTxD

        return block(config, params, layer, x_BxTxD, reaches, keep), kept

    # For a gradient, matrix products are kept from the forward pass and the rest is computed again (all of it with
    # remat); otherwise a copy of every layer's parameters would be kept too.
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if config.remat else policies.dots_saveable
    return lax.scan(jax.checkpoint(body, policy=policy, prevent_cse=False), x_BxTxD, jnp.arange(start, stop))


def unembed(config: DecoderConfig, params: Params, x_BxTxD: jax.Array) -> jax.Array:
    """Final norm and head: logits [B, T, V] in fp32 of the stream leaving the last layer."""
    x_BxTxD = norm(config, params, "final_norm", x_BxTxD)
    name, pattern = ("embed_VxD", "...d,vd->...v") if config.tied else ("unembed_DxV", "...d,dv->...v")
    logits_BxTxV = einsum(pattern, x_BxTxD, params[name])
    if config.unembed_bias:
        logits_BxTxV = logits_BxTxV + like(params["unembed_bias_V"], logits_BxTxV)
    return soft_cap(logits_BxTxV, config.logit_cap)


def head_of(config: DecoderConfig, params: Params, ids_N: jax.Array) -> Params:
    """Parameters with which ``unembed`` gives the logits of these ids only, [B, T, N]."""
    name, axis = ("embed_VxD", 0) if config.tied else ("unembed_DxV", 1)
    part = {name: jnp.take(params[name], ids_N, axis=axis)}
    if config.unembed_bias:
        part["unembed_bias_V"] = params["unembed_bias_V"][ids_N]
    return {**params, **part}


def block(
    config: DecoderConfig,
    params: Params,
    layer: int | jax.Array,
    x_BxTxD: jax.Array,
    reaches: Reaches,
    hook: LayerHook,
    meet: Meet | None = None,
) -> jax.Array:
    """One layer, with its sites given to the hook."""
    weights = layer_params(params, layer)
    before_BxTxD = hook("resid_pre", x_BxTxD)
    normed_BxTxD = norm(config, weights, "attn_norm", before_BxTxD)
    out_BxTxD = attention(config, weights, normed_BxTxD, reaches.at(config, layer), meet)
    if config.post_norms:
        out_BxTxD = norm(config, weights, "attn_post_norm", out_BxTxD)
    x_BxTxD = hook("resid_mid", before_BxTxD + hook("attn_out", out_BxTxD))
    if not config.shared_norm:
        normed_BxTxD = norm(config, weights, "mlp_norm", before_BxTxD if config.parallel else x_BxTxD)
    out_BxTxD = mlp(config, weights, hook("mlp_in", normed_BxTxD))
    if config.post_norms:
        out_BxTxD = norm(config, weights, "mlp_post_norm", out_BxTxD)
    return hook("resid_post", x_BxTxD + hook("mlp_out", out_BxTxD))


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


def no_hook(kind: str, value_BxTxD: jax.Array) -> jax.Array:
    return value_BxTxD


def call_hook(hook: Hook, layer: int, kind: str, value_BxTxD: jax.Array) -> jax.Array:
    return hook(Site(kind, layer), value_BxTxD)

"""A causal decoder as pure functions: ``embed``, ``run_layers``, ``unembed``.

Shapes: B prompts, T tokens, D ``d_model``, H query heads, N key-value heads, G = H/N, K head width, F MLP width,
V vocabulary, C context, L layers. Prompts are padded on the right: attention is causal, so padding never reaches a
real position; with a cache they are padded on the left (see ``decoding``). Everything works under ``jax.jit``,
``jax.vmap`` and ``jax.grad``, in the dtype of the parameters; norms, rotary angles, softmax and logits are computed in
fp32.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.models import torch_bridge
from saejax.models.attention import (
    AttentionFunction,
    AttentionSpec,
    AttentionTables,
    Layer,
    TablesByLayer,
    attend,
    attention,
    attention_weights,
    whole_prompt_tables,
)
from saejax.models.config import GRADIENT, DecoderConfig, RunRules, TorchConfig
from saejax.models.experts import mix_experts
from saejax.models.fused_attention import attend_fused, find_kernel
from saejax.models.layers import NO_TAPS, SiteHook, Taps, align_rank, einsum, layer_of, mlp, norm, soft_cap
from saejax.models.parameters import LAYERS
from saejax.models.sites import INNER_KINDS, PATTERN
from saejax.parallel.mesh import mesh_of

Params = Mapping[str, Any]
KEYS, VALUES = "keys", "values"  # what ``run_layers`` can collect besides kinds of site and ``PATTERN``


def embed(config: DecoderConfig, params: Params, ids_xT: jax.Array, positions_xT: jax.Array | None = None) -> jax.Array:
    """Return the residual stream entering layer 0, [..., T, D].

    Families with learned positions add those at ``positions``, of the tokens ``ids``; None: 0 to T - 1.
    """
    if isinstance(config, TorchConfig):
        return torch_bridge.embed(config, params, ids_xT)
    x_xTxD = params["embed_VxD"][ids_xT]
    if config.embed_scale != 1:
        # In the stream's dtype: these models are trained with the factor rounded to bfloat16.
        x_xTxD = x_xTxD * jnp.asarray(config.embed_scale, x_xTxD.dtype)
    if config.learned_positions:
        positions = jnp.arange(ids_xT.shape[-1]) if positions_xT is None else positions_xT
        x_xTxD = x_xTxD + align_rank(params["position_CxD"][positions], x_xTxD)
    return x_xTxD


def unembed(config: DecoderConfig, params: Params, x_xD: jax.Array, rules: RunRules = GRADIENT) -> jax.Array:
    """Return the fp32 logits [..., V] of the stream leaving the last layer: final norm, unembedding, soft cap."""
    if isinstance(config, TorchConfig):
        return torch_bridge.unembed(config, params, x_xD)
    x_xD = norm(config, rules, params, "final_norm", x_xD)
    name, pattern = ("embed_VxD", "...d,vd->...v") if config.tied else ("unembed_DxV", "...d,dv->...v")
    logits_xV = einsum(pattern, x_xD, params[name])
    if config.unembed_bias:
        logits_xV = logits_xV + align_rank(params["unembed_bias_V"], logits_xV)
    return soft_cap(logits_xV, config.final_logit_softcap)


def restrict_unembedding(config: DecoderConfig, params: Params, ids_N: jax.Array) -> Params:
    """Return parameters with which ``unembed`` computes the logits of the token ids ``ids`` only, [B, T, N]."""
    if isinstance(config, TorchConfig):
        return torch_bridge.restrict_unembedding(params, ids_N)
    name, axis = ("embed_VxD", 0) if config.tied else ("unembed_DxV", 1)
    rows = {name: jnp.take(params[name], ids_N, axis=axis)}
    if config.unembed_bias:
        rows["unembed_bias_V"] = params["unembed_bias_V"][ids_N]
    return {**params, **rows}


def run_layer(
    config: DecoderConfig,
    rules: RunRules,
    params: Params,
    layer: int | jax.Array,
    x_xTxD: jax.Array,
    tables: TablesByLayer,
    hook: SiteHook,
    function: AttentionFunction | None = None,
    inner_sites: bool = False,
) -> jax.Array:
    """Run one layer, whose number may be an array, on the stream x that enters it; return the stream leaving it.

    ``params`` are the decoder's, all layers stacked, and ``tables`` the masks and rotary tables of all layers. The hook
    is called while tracing at each of the layer's sites, in their order, with its kind and its value [B, T, D]; what it
    returns replaces the value. With ``inner_sites`` it is called at those, too, whose width is not D. The attention
    function is ``attention.attend`` where none is given.
    """
    if isinstance(config, TorchConfig):
        raise torch_bridge.not_in_torch_error(config)
    weights = layer_params(params, layer)
    before_xTxD = hook("resid_pre", x_xTxD)
    normed_xTxD = norm(config, rules, weights, "attn_norm", before_xTxD) if config.pre_norms else before_xTxD
    inner_hook = hook if inner_sites else None
    out_xTxD = attention(config, rules, weights, normed_xTxD, tables.at(config, layer), function, inner_hook)
    if config.post_norms:
        out_xTxD = norm(config, rules, weights, "attn_post_norm", out_xTxD)
    x_xTxD = hook("resid_mid", before_xTxD + hook("attn_out", out_xTxD))
    if not config.pre_norms:
        normed_xTxD = x_xTxD
    # With ``shared_norm`` the MLP reads what attention read, normed once (Phi).
    elif not config.shared_norm:
        normed_xTxD = norm(config, rules, weights, "mlp_norm", before_xTxD if config.parallel else x_xTxD)
    normed_xTxD = hook("mlp_in", normed_xTxD)
    if config.n_experts:
        out_xTxD = mix_experts(config, rules, params, layer, normed_xTxD)
    else:
        out_xTxD = mlp(config, rules, weights, normed_xTxD, inner_hook)
    if config.post_norms:
        out_xTxD = norm(config, rules, weights, "mlp_post_norm", out_xTxD)
    return hook("resid_post", x_xTxD + hook("mlp_out", out_xTxD))


def layer_params(params: Params, layer: int | jax.Array) -> dict[str, jax.Array]:
    """Return one layer's parameters, by their names without "layers."."""
    return {
        name.removeprefix(LAYERS): layer_of(value, layer) for name, value in params.items() if name.startswith(LAYERS)
    }


class LayersOutput(NamedTuple):
    """Result of a run of layers."""

    x: jax.Array  #: the stream leaving the last of them, [B, T, D]
    #: by kind, the values in the layers of the run that are collected, [L, B, T, D]; keys (after the rotary embedding)
    #: and values are [L, B, T, N, K], attention patterns [L, B, H, T, T].
    collected: dict[str, jax.Array]
    carried: Any  #: what the attention carried out of the last layer


def run_layers(
    config: DecoderConfig,
    params: Params,
    x_xTxD: jax.Array,
    start: int | jax.Array,
    stop: int,
    taps: Taps = NO_TAPS,
    *,
    rules: RunRules = GRADIENT,
    attention: AttentionSpec | None = None,
) -> LayersOutput:
    """Run layers ``start`` to ``stop - 1`` on the residual stream that enters layer ``start``.

    ``run_layers(config, params, x, L + 1, config.n_layers)`` is the rest of the model after ``resid_post.L``. Layers
    run in one loop that indexes the stacked parameters, so that the time to compile does not grow with their number.

    Args:
      config: the decoder.
      params: parameters of ``parameters.parameter_table``.
      x_xTxD: the stream entering layer ``start``.
      start: if it is an array (int32 []), one program runs from any layer; then nothing is collected, and the run
        cannot be differentiated backwards.
      stop: number of the layer after the last one.
      taps: the sites at which values are changed and collected.
      rules: rules of differentiation.
      attention: how tokens attend; None: to one another, at positions 0 to T - 1.
    """
    if isinstance(config, TorchConfig):
        return LayersOutput(*torch_bridge.run_layers(config, x_xTxD, start, stop, taps, rules, attention), None)
    hook_layers, collect = taps.hook_layers, taps.collect
    spec = attention or AttentionSpec(whole_prompt_tables(config, x_xTxD.shape[-2]))
    mesh = mesh_of(params[f"{LAYERS}k_DxNxK"])
    kernel = find_kernel(config, rules, mesh, x_xTxD) if attention is None else None
    inner_sites = taps.inner_sites or not set(INNER_KINDS).isdisjoint(collect)

    def run(hooked: bool, carry: tuple[jax.Array, Any], layer: Layer) -> tuple[tuple[jax.Array, Any], dict[str, Any]]:
        """Run one layer; return the stream leaving it and the attention's carry, and what is collected there."""
        (x, carried), collected = carry, {}

        def at_site(kind: str, value: jax.Array) -> jax.Array:
            """Call the hook at a site and collect its value."""
            if taps.hook and hooked and (taps.inner_sites or kind not in INNER_KINDS):
                value = taps.hook(kind, layer, value)
            if kind in collect:
                collected[kind] = value
            return value

        def attend_here(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
            """Attend, and collect keys, values and the attention pattern."""
            nonlocal carried
            collected.update({name: array for name, array in ((KEYS, k), (VALUES, v)) if name in collect})
            if PATTERN in collect:  # computed by itself: a fused kernel and blocks of queries never hold all of it
                inputs = (q, k, tables) if spec.pattern_inputs is None else spec.pattern_inputs(layer, q, k, tables)
                pattern_xNxGxTxS = attention_weights(config, rules, *inputs)
                shape = *pattern_xNxGxTxS.shape[:-4], config.n_heads, *pattern_xNxGxTxS.shape[-2:]
                collected[PATTERN] = pattern_xNxGxTxS.reshape(shape)
            if kernel is not None:
                return attend_fused(kernel, config, mesh, (q, k, v), spec.tables, layer)
            plain = functools.partial(attend, config, rules, tables=tables)
            if spec.function is None:
                return plain(q, k, v)
            attended, carried = spec.function(plain, layer, (q, k, v), carried)
            return attended

        x = run_layer(config, rules, params, layer, x, spec.tables, at_site, attend_here, inner_sites)
        return (x, carried), collected

    def step(hooked: bool, carry: Any, layer: Layer) -> tuple[Any, dict[str, Any]]:
        """Run one layer, and move what is collected in some layers only to where the carry keeps it."""
        *carry, kept = carry
        carry, collected = run(hooked, tuple(carry), layer)
        kept = {kind: _keep(kept[kind], collected.pop(kind), layers[kind], layer, stop) for kind in kept}
        return (*carry, kept), collected

    body = functools.partial(step, hook_layers is None)
    carry: Any = x_xTxD, spec.carried
    if not isinstance(start, int):
        x, carried = lax.fori_loop(start, stop, lambda layer, carry: run(hook_layers is None, carry, layer)[0], carry)
        return LayersOutput(x, {}, carried)
    layers = collect if isinstance(collect, Mapping) else {}
    shapes = jax.eval_shape(lambda carry: run(False, carry, start)[1], carry) if layers else {}
    carry = *carry, {kind: jnp.zeros((len(layers[kind]), *leaf.shape), leaf.dtype) for kind, leaf in shapes.items()}
    # A gradient keeps the matrix products of the forward pass and computes the rest again (everything with remat).
    # Without the checkpoint it would also keep a copy of every layer's parameters.
    # prevent_cse=False: within a scan nothing can be merged, so the barriers against that would only cost.
    loop = jax.checkpoint(body, policy=rules.remat_policy, prevent_cse=False)
    parts: list[dict[str, jax.Array]] = []
    for layer in [*sorted(set(hook_layers or ()) & set(range(start, stop))), stop]:
        if start < layer or (collect and not parts and layer == stop):  # a run of no layers collects empty arrays
            carry, collected = lax.scan(loop, carry, jnp.arange(start, layer))
            parts.append(collected)
        if layer < stop:
            carry, collected = step(True, carry, layer)
            parts.append({name: value[None] for name, value in collected.items()})
        start = layer + 1
    collected = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if len(parts) > 1 else dict(*parts)
    x, carried, kept = carry
    return LayersOutput(x, collected | kept, carried)


def _keep(kept_Lx: jax.Array, value_xD: jax.Array, layers: Sequence[int], layer: Layer, stop: int) -> jax.Array:
    """Put a layer's value among those of ``layers``, if it is one of them; layers come in their order."""
    # Any other writes where the next of them will, and so nothing is read, but after the last one.
    place = jnp.asarray(np.minimum(np.searchsorted(layers, np.arange(stop)), len(layers) - 1))[layer]
    if layers[-1] < stop - 1:
        value_xD = jnp.where(layer <= layers[-1], value_xD, lax.dynamic_index_in_dim(kept_Lx, place, keepdims=False))
    return lax.dynamic_update_index_in_dim(kept_Lx, value_xD, place, 0)

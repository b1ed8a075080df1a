"""The decoder's parts: pure functions of a configuration, rules, parameters and token ids. ``run`` runs its layers.

Shapes: B prompts, T tokens, D ``d_model``, H query heads, N key-value heads, G = H/N, K head width, F MLP width,
V vocabulary, C context, L layers. Prompts are padded on the right: attention is causal, so padding never reaches a
real position; with a cache they are padded on the left (see ``cache``). Everything works under ``jax.jit``,
``jax.vmap`` and ``jax.grad``, in the dtype of the parameters; norms, rotary angles, softmax and logits are computed in
fp32.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.attention import (
    AttentionFunction,
    AttentionSpec,
    AttentionTables,
    Layer,
    TablesByLayer,
    attend,
    attention,
    whole_prompts,
)
from saejax.models.config import GRADIENT, DecoderConfig, RunRules
from saejax.models.layers import align_rank, einsum, mlp, norm, soft_cap
from saejax.models.parameters import LAYERS

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
        x_xTxD = x_xTxD + align_rank(params["position_CxD"][positions], x_xTxD)
    return x_xTxD


def unembed(config: DecoderConfig, params: Params, x_xD: jax.Array, rules: RunRules = GRADIENT) -> jax.Array:
    """Final norm and head: logits [..., V] in fp32 of the stream leaving the last layer."""
    x_xD = norm(config, rules, params, "final_norm", x_xD)
    name, pattern = ("embed_VxD", "...d,vd->...v") if config.tied else ("unembed_DxV", "...d,dv->...v")
    logits_xV = einsum(pattern, x_xD, params[name])
    if config.unembed_bias:
        logits_xV = logits_xV + align_rank(params["unembed_bias_V"], logits_xV)
    return soft_cap(logits_xV, config.final_logit_softcap)


def restrict_unembedding(config: DecoderConfig, params: Params, ids_N: jax.Array) -> Params:
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
    normed_xTxD = norm(config, rules, weights, "attn_norm", before_xTxD) if config.pre_norms else before_xTxD
    out_xTxD = attention(config, rules, weights, normed_xTxD, tables.at(config, layer), function)
    if config.post_norms:
        out_xTxD = norm(config, rules, weights, "attn_post_norm", out_xTxD)
    x_xTxD = hook("resid_mid", before_xTxD + hook("attn_out", out_xTxD))
    if not config.pre_norms:
        normed_xTxD = x_xTxD
    elif not config.shared_norm:
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


Hook = Callable[[str, Layer, jax.Array], jax.Array]
KEYS, VALUES = "keys", "values"  # what can be collected beside the kinds of site


class LayersOutput(NamedTuple):
    """What a run of layers gave.

    Attributes:
      x: the stream leaving the last of them, [B, T, D].
      collected: for each kind that was asked for its values in all layers of the run, [L, B, T, D]; of keys (after the
        rotary embedding) and values [L, B, T, N, K].
      carried: what the attention carried on.
    """

    x: jax.Array
    collected: dict[str, jax.Array]
    carried: Any


def run_layers(
    config: DecoderConfig,
    params: Params,
    x_xTxD: jax.Array,
    start: int | jax.Array,
    stop: int,
    hook: Hook | None = None,
    hook_layers: Collection[int] | None = (),
    *,
    rules: RunRules = GRADIENT,
    attention: AttentionSpec | None = None,
    collect: Collection[str] = (),
    before_hook: bool = False,
) -> LayersOutput:
    """Runs layers ``start`` to ``stop - 1`` on the residual stream that enters layer ``start``.

    So ``run_layers(config, params, x, L + 1, config.n_layers)`` is the rest of the model after ``resid_post.L``. Layers
    run in one loop that indexes the stacked parameters, so that the time to compile does not grow with their number.

    Args:
      x_xTxD: the stream entering layer ``start``.
      start: if it is an array (int32 []), one program runs from any layer; then nothing is collected, and the run
        cannot be differentiated backwards.
      hook: called while tracing, at every site of the layers in ``hook_layers``, with its kind, its layer's number and
        its value [B, T, D]; the model goes on with what it returns.
      hook_layers: these layers are unrolled, so that the hook knows their numbers. None: the hook is called in every
        layer, in the loop, where the layer's number is an array.
      rules: what differentiation goes by.
      attention: how tokens attend; None: to one another, at positions 0 to T - 1.
      collect: kinds of site, ``KEYS`` and ``VALUES``.
      before_hook: collect the values of sites as they were before the hook changed them.
    """
    attention = attention or AttentionSpec(whole_prompts(config, x_xTxD.shape[-2]))
    step = functools.partial(_step, config, rules, params, attention, hook, collect, before_hook)
    body = functools.partial(step, hook_layers is None)
    carry = x_xTxD, attention.carried
    if not isinstance(start, int):
        x, carried = lax.fori_loop(start, stop, lambda layer, carry: body(carry, layer)[0], carry)
        return LayersOutput(x, {}, carried)
    # For a gradient, matrix products are kept from the forward pass and the rest is computed again (all of it with
    # remat); otherwise a copy of every layer's parameters would be kept too.
    loop = jax.checkpoint(body, policy=rules.kept, prevent_cse=False)
    parts: list[dict[str, jax.Array]] = []
    for layer in [*sorted(set(hook_layers or ()) & set(range(start, stop))), stop]:
        if start < layer or (collect and not parts and layer == stop):  # of no layers, arrays of none are collected
            carry, found = lax.scan(loop, carry, jnp.arange(start, layer))
            parts.append(found)
        if layer < stop:
            carry, found = step(True, carry, layer)
            parts.append({name: value[None] for name, value in found.items()})
        start = layer + 1
    collected = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if len(parts) > 1 else dict(*parts)
    return LayersOutput(carry[0], collected, carry[1])


def _step(
    config: DecoderConfig,
    rules: RunRules,
    params: Params,
    attention: AttentionSpec,
    hook: Hook | None,
    collect: Collection[str],
    before_hook: bool,
    hooked: bool,
    carry: tuple[jax.Array, Any],
    layer: Layer,
) -> tuple[tuple[jax.Array, Any], dict[str, jax.Array]]:
    """One layer: the stream leaving it and what the attention carries on, and what is collected there."""
    (x, carried), found = carry, {}

    def at_site(kind: str, value: jax.Array) -> jax.Array:
        new = hook(kind, layer, value) if hook and hooked else value
        if kind in collect:
            found[kind] = value if before_hook else new
        return new

    def attended(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
        nonlocal carried
        found.update({name: part for name, part in ((KEYS, k), (VALUES, v)) if name in collect})
        plain = functools.partial(attend, config, rules, tables=tables)
        if attention.function is None:
            return plain(q, k, v)
        out, carried = attention.function(plain, layer, (q, k, v), carried)
        return out

    x = run_layer(config, rules, params, layer, x, attention.tables, at_site, attended)
    return (x, carried), found

"""The decoder: pure functions of a configuration, parameters and token ids.

Shapes: B prompts, T tokens, D ``d_model``, H query heads, N key-value heads, G = H/N, K head width, F MLP width,
V vocabulary, L layers. Prompts are padded on the right: attention is causal, so padding never reaches a real
position. Everything works under ``jax.jit``, ``jax.vmap`` and ``jax.grad``, in the dtype of the parameters; norms,
rotary angles, softmax and logits are computed in fp32.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.models.config import DecoderConfig
from saejax.models.sites import Site

Params = Mapping[str, Any]
Hook = Callable[[Site, jax.Array], jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
_PIECES = 8


def parameter_table(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Every parameter: its name, shape, and the mesh axis over which each dimension is split.

    Names that start with "layers." are stacked: their first dimension counts layers.
    """
    layers, d, h, n, k, f, v = (
        config.n_layers,
        config.d_model,
        config.n_heads,
        config.n_kv_heads,
        config.d_head,
        config.d_mlp,
        config.vocab,
    )
    table: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
        "embed_VxD": ((v, d), ("model", None)),
        "final_norm_D": ((d,), (None,)),
        "layers.attn_norm_D": ((layers, d), (None, None)),
        "layers.q_DxHxK": ((layers, d, h, k), (None, None, "model", None)),
        "layers.k_DxNxK": ((layers, d, n, k), (None, None, "model", None)),
        "layers.v_DxNxK": ((layers, d, n, k), (None, None, "model", None)),
        "layers.o_HxKxD": ((layers, h, k, d), (None, "model", None, None)),
        "layers.mlp_norm_D": ((layers, d), (None, None)),
        "layers.gate_DxF": ((layers, d, f), (None, None, "model")),
        "layers.up_DxF": ((layers, d, f), (None, None, "model")),
        "layers.down_FxD": ((layers, f, d), (None, "model", None)),
    }
    if not config.tied:
        table["unembed_DxV"] = ((d, v), (None, "model"))
    if config.attention_bias:
        table["layers.q_bias_HxK"] = ((layers, h, k), (None, "model", None))
        table["layers.k_bias_NxK"] = ((layers, n, k), (None, "model", None))
        table["layers.v_bias_NxK"] = ((layers, n, k), (None, "model", None))
        table["layers.o_bias_D"] = ((layers, d), (None, None))
    if config.mlp_bias:
        table["layers.gate_bias_F"] = ((layers, f), (None, "model"))
        table["layers.up_bias_F"] = ((layers, f), (None, "model"))
        table["layers.down_bias_D"] = ((layers, d), (None, None))
    return table


def embed(config: DecoderConfig, params: Params, ids_BxT: jax.Array) -> jax.Array:
    """The residual stream entering layer 0, [B, T, D]."""
    return params["embed_VxD"][ids_BxT]


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
    rope = _rope_tables(config, x_BxTxD.shape[-2])
    if hook is not None:
        for layer in sorted(set(hook_layers) & set(range(start, stop))):
            x_BxTxD, _ = scan_layers(config, params, x_BxTxD, start, layer)
            bound = functools.partial(_call_hook, hook, layer)
            x_BxTxD = _block(config, _layer_params(params, layer), x_BxTxD, rope, bound)
            start = layer + 1
    return scan_layers(config, params, x_BxTxD, start, stop)[0]


def scan_layers(
    config: DecoderConfig, params: Params, x_BxTxD: jax.Array, start: int, stop: int, kinds: Collection[str] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs layers ``start`` to ``stop - 1`` in one scan, whose compile time does not grow with their number.

    Returns:
      The stream leaving layer ``stop - 1``, and for each of ``kinds`` of site its values [stop - start, B, T, D].
    """
    rope = _rope_tables(config, x_BxTxD.shape[-2])

    def body(x_BxTxD: jax.Array, layer: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        kept: dict[str, jax.Array] = {}

        def keep(kind: str, value_BxTxD: jax.Array) -> jax.Array:
            if kind in kinds:
                kept[kind] = value_BxTxD
            return value_BxTxD

        return _block(config, _layer_params(params, layer), x_BxTxD, rope, keep), kept

    # For a gradient, matrix products are kept from the forward pass and the rest is computed again; otherwise a copy
    # of every layer's parameters would be kept too.
    body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    return lax.scan(body, x_BxTxD, jnp.arange(start, stop))


def _call_hook(hook: Hook, layer: int, kind: str, value_BxTxD: jax.Array) -> jax.Array:
    return hook(Site(kind, layer), value_BxTxD)


def unembed(config: DecoderConfig, params: Params, x_BxTxD: jax.Array) -> jax.Array:
    """Final norm and head: logits [B, T, V] in fp32 of the stream leaving the last layer."""
    x_BxTxD = _norm(config, x_BxTxD, params["final_norm_D"])
    head, pattern = (params["embed_VxD"], "...d,vd->...v") if config.tied else (params["unembed_DxV"], "...d,dv->...v")
    return jnp.einsum(pattern, x_BxTxD, head, preferred_element_type=_wide(x_BxTxD))


def _wide(x: jax.Array) -> jnp.dtype:
    """The dtype of norms, rotary embedding, softmax and logits: fp32, or fp64 where the parameters are."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _layer_params(params: Params, layer: int | jax.Array) -> dict[str, jax.Array]:
    prefix = "layers."
    return {
        name.removeprefix(prefix): lax.dynamic_index_in_dim(value, layer, keepdims=False)
        for name, value in params.items()
        if name.startswith(prefix)
    }


def _block(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    x_BxTxD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    hook: Callable[[str, jax.Array], jax.Array],
) -> jax.Array:
    x_BxTxD = hook("resid_pre", x_BxTxD)
    attended_BxTxD = _attention(config, weights, _norm(config, x_BxTxD, weights["attn_norm_D"]), rope)
    x_BxTxD = hook("resid_mid", x_BxTxD + hook("attn_out", attended_BxTxD))
    read_BxTxD = hook("mlp_in", _norm(config, x_BxTxD, weights["mlp_norm_D"]))
    return hook("resid_post", x_BxTxD + hook("mlp_out", _mlp(config, weights, read_BxTxD)))


def _norm(config: DecoderConfig, x_BxTxD: jax.Array, scale_D: jax.Array) -> jax.Array:
    """RMS norm: x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 2019)."""
    wide_BxTxD = x_BxTxD.astype(_wide(x_BxTxD))
    mean_square = jnp.mean(jnp.square(wide_BxTxD), axis=-1, keepdims=True)
    normed_BxTxD = (wide_BxTxD * lax.rsqrt(mean_square + config.norm_eps)).astype(x_BxTxD.dtype)
    return normed_BxTxD * _like(scale_D, normed_BxTxD)


def _rope_tables(config: DecoderConfig, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency, each [T, K/2], fp32. Frequency i is theta^(-2i/K)."""
    frequencies = (config.rope_theta ** -(np.arange(0, config.d_head, 2) / config.d_head)).astype(np.float32)
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x_BxTxNxK: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding (Su et al., 2021) in the half-split layout: dimension i turns with dimension i + K/2."""
    cos, sin = (_like(table[:, None, :], x_BxTxNxK) for table in rope)
    first, second = jnp.split(x_BxTxNxK.astype(_wide(x_BxTxNxK)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxK.dtype)


def _attention(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    x_BxTxD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Causal grouped-query attention, without the residual connection."""
    q = _project("...td,dhk->...thk", x_BxTxD, weights["q_DxHxK"], weights.get("q_bias_HxK"))
    k = _project("...td,dnk->...tnk", x_BxTxD, weights["k_DxNxK"], weights.get("k_bias_NxK"))
    v = _project("...td,dnk->...tnk", x_BxTxD, weights["v_DxNxK"], weights.get("v_bias_NxK"))
    q, k = _rotate(q, rope), _rotate(k, rope)
    q = q.reshape(*q.shape[:-2], config.n_kv_heads, config.n_heads // config.n_kv_heads, config.d_head)
    scores = jnp.einsum("...tngk,...snk->...ngts", q, k, preferred_element_type=_wide(q)) / math.sqrt(config.d_head)
    length = scores.shape[-1]
    seen_TxT = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(jnp.broadcast_to(seen_TxT, scores.shape), scores, -jnp.inf)
    weights_NxGxTxT = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("...ngts,...snk->...tngk", weights_NxGxTxT, v)
    mixed = mixed.reshape(*mixed.shape[:-3], config.n_heads, config.d_head)
    return _project("...thk,hkd->...td", mixed, weights["o_HxKxD"], weights.get("o_bias_D"))


def _mlp(config: DecoderConfig, weights: Mapping[str, jax.Array], x_BxTxD: jax.Array) -> jax.Array:
    """Gated MLP: down(activation(gate(x)) * up(x)) (Shazeer, 2020)."""
    gate = _project("...td,df->...tf", x_BxTxD, weights["gate_DxF"], weights.get("gate_bias_F"))
    up = _project("...td,df->...tf", x_BxTxD, weights["up_DxF"], weights.get("up_bias_F"))
    hidden = ACTIVATIONS[config.activation](gate) * up
    down_FxD, down_bias_D = weights["down_FxD"], weights.get("down_bias_D")
    if config.d_mlp % _PIECES or hidden.dtype != jnp.float32:
        return _project("...tf,fd->...td", hidden, down_FxD, down_bias_D)
    # The longest sum of a layer is taken in pieces. On a CPU, which adds one term after the other, this halves the
    # error of models whose MLP makes attention sinks (terms of 10^4 that later layers cancel) and costs 4 % of time,
    # as long as the pieces are added one by one: XLA's own reduction over a leading dimension is slow there.
    hidden = hidden.reshape(*hidden.shape[:-1], _PIECES, -1)
    pieces = jnp.einsum("...tpf,pfd->p...td", hidden, down_FxD.reshape(_PIECES, -1, config.d_model))
    out_BxTxD = functools.reduce(jnp.add, [pieces[i] for i in range(_PIECES)])
    return out_BxTxD if down_bias_D is None else out_BxTxD + _like(down_bias_D, out_BxTxD)


def _project(pattern: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = jnp.einsum(pattern, x, weight)
    return y if bias is None else y + _like(bias, y)


def _like(parameter: jax.Array, value: jax.Array) -> jax.Array:
    """The parameter with leading dimensions of size 1 up to the value's number of dimensions."""
    return parameter.reshape((1,) * (value.ndim - parameter.ndim) + parameter.shape)

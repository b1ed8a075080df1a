"""The parts of a decoder layer that act on each position alone: norms, projections, the MLP."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.config import DecoderConfig, RunRules

Weights = Mapping[str, jax.Array]
SiteHook = Callable[[str, jax.Array], jax.Array]  # maps a kind of site and its value to the value that replaces it

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def norm(
    config: DecoderConfig, rules: RunRules, weights: Weights, name: str, x: jax.Array, letter: str = "D"
) -> jax.Array:
    """Normalise the last dimension of x with the parameters ``name``, as ``config.norm`` says.

    - "rms": ``x / sqrt(mean(x^2) + eps) * scale`` (Zhang and Sennrich, 2019);
    - "rms_plus_one": the same with ``1 + scale``;
    - "layer": ``(x - mean(x)) / sqrt(var(x) + eps) * scale + bias`` (Ba et al., 2016).

    ``letter`` is that of the last dimension in the parameters' names.
    """
    # bfloat16 has 8 bits of precision: a sum of squares in it would be off by percents.
    y, scale = x.astype(at_least_float32(x)), weights[f"{name}_{letter}"]
    if config.norm == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * rules.factor(lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_eps))
    if config.norm == "rms":
        # Llama rounds to the stream's dtype before it scales, the other norms after; in bfloat16 the two differ.
        y = y.astype(x.dtype)
        return y * align_rank(scale, y)
    y = y * align_rank((1 if config.norm == "rms_plus_one" else 0) + scale.astype(y.dtype), y)
    if config.norm == "layer":
        y = y + align_rank(weights[f"{name}_bias_{letter}"], y)
    return y.astype(x.dtype)


def mlp_neurons(config: DecoderConfig, rules: RunRules, weights: Weights, x_xTxD: jax.Array) -> jax.Array:
    """Return activation(up(x)), [B, T, F] in the dtype of x; activation(gate(x)) * up(x) if gated (Shazeer, 2020)."""
    activation = ACTIVATIONS[config.activation]
    hidden = _project_float32("...td,df->...tf", x_xTxD, weights["up_DxF"], weights.get("up_bias_F"))
    if config.gated:
        gate = _project_float32("...td,df->...tf", x_xTxD, weights["gate_DxF"], weights.get("gate_bias_F"))
        hidden = rules.product(rules.activation(gate, activation(gate)), hidden)
    else:
        hidden = rules.activation(hidden, activation(hidden))
    return hidden.astype(x_xTxD.dtype)


def mlp(config: DecoderConfig, rules: RunRules, weights: Weights, x_xTxD: jax.Array) -> jax.Array:
    """Return down(``mlp_neurons``(x)), or the output of a mixture of experts; [B, T, D]."""
    if config.n_experts:
        return _mix_experts(config, rules, weights, x_xTxD)
    hidden = mlp_neurons(config, rules, weights, x_xTxD)
    return project("...tf,fd->...td", hidden, weights["down_FxD"], weights.get("down_bias_D"))


def _mix_experts(config: DecoderConfig, rules: RunRules, weights: Weights, x_xTxD: jax.Array) -> jax.Array:
    """Return the mean of some experts' outputs, weighted by a router (Shazeer et al., 2017); [B, T, D].

    Every expert runs on every token, one after the other: simple, the same for any batch, and in memory for one expert
    at a time, but ``n_experts / experts_per_token`` times the products that are needed.
    """
    logits_xTxE = _project_float32("...td,de->...te", x_xTxD, weights["router_DxE"], None)
    top, chosen = lax.top_k(jax.nn.softmax(logits_xTxE, axis=-1), config.experts_per_token)
    if config.normalize_experts:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    # As shares of all experts, most of them 0, since every expert runs on every token.
    share_xTxE = jnp.sum(jax.nn.one_hot(chosen, config.n_experts, dtype=top.dtype) * top[..., None], axis=-2)
    # The router's choice is constant under the rules, as attention weights are.
    share_xTxE = rules.factor(share_xTxE.astype(x_xTxD.dtype))
    dense = dataclasses.replace(config, n_experts=0)

    def add_expert(total_xTxD: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        """Add an expert's output, times the share that each token gives it."""
        share_xT, *matrices = expert
        out_xTxD = mlp(dense, rules, dict(zip(("gate_DxF", "up_DxF", "down_FxD"), matrices, strict=True)), x_xTxD)
        return total_xTxD + share_xT[..., None] * out_xTxD, None

    experts = (weights["gate_ExDxF"], weights["up_ExDxF"], weights["down_ExFxD"])
    return lax.scan(add_expert, jnp.zeros_like(x_xTxD), (jnp.moveaxis(share_xTxE, -1, 0), *experts))[0]


def project(pattern: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return the ``einsum`` of x and weight by a pattern, plus the bias if there is one, in the dtype of x."""
    return _project_float32(pattern, x, weight, bias).astype(x.dtype)


def _project_float32(pattern: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return the projection in at least float32: XLA:CPU multiplies bfloat16 at twice the speed into fp32 sums."""
    y = einsum(pattern, x, weight)
    return y if bias is None else y + align_rank(bias, y)


def einsum(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the product of a and b by a pattern in at least float32; of fp32 without the TF32 of GPUs and TPUs."""
    precision = None if a.dtype == jnp.bfloat16 else "highest"
    return jnp.einsum(pattern, a, b, preferred_element_type=at_least_float32(a), precision=precision)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Return ``cap * tanh(x / cap)``; x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def align_rank(parameter: jax.Array, value: jax.Array) -> jax.Array:
    """Return the parameter with leading dimensions of size 1, up to the value's number of dimensions."""
    return parameter.reshape((1,) * (value.ndim - parameter.ndim) + parameter.shape)


def at_least_float32(x: jax.Array) -> jnp.dtype:
    """Return the dtype of norms, rotary embedding, softmax and logits: fp32, or fp64 where the parameters are."""
    return jnp.promote_types(x.dtype, jnp.float32)

"""The parts of a decoder layer that act on each position alone: norms, projections, the MLP."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.config import DecoderConfig, RunRules
from saejax.models.sites import NEURONS

Weights = Mapping[str, jax.Array]
SiteHook = Callable[[str, jax.Array], jax.Array]  # maps a kind of site and its value to the value that replaces it
# Maps a kind of site, a layer, whose number may be an array, and the site's value to the value that replaces it.
Hook = Callable[[str, Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Taps:
    """Sites at which a run of layers is read and changed.

    Attributes:
      hook: called while tracing at every site of the layers in ``hook_layers``, with its kind, its layer's number and
        its value [B, T, D]; the result replaces the value.
      hook_layers: layers to unroll, so that the hook gets their numbers. None: the hook is called in every layer,
        within the loop, where the layer's number is an array.
      inner_sites: whether the hook is called at the sites within attention and the MLP, too, whose width is not D.
      collect: kinds whose values, as the hook leaves them, are returned: kinds of site, ``sites.PATTERN`` where all
        tokens of prompts are run, ``decoder.KEYS``, ``decoder.VALUES``. A mapping gives the layers of each, ascending
        and at least one: the values of others are in memory no longer than their layers run.
    """

    hook: Hook | None = None
    hook_layers: Collection[int] | None = ()
    inner_sites: bool = False
    collect: Collection[str] | Mapping[str, Sequence[int]] = ()


NO_TAPS = Taps()
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def norm(
    config: DecoderConfig, rules: RunRules, weights: Weights, name: str, x: jax.Array, letter: str = "D"
) -> jax.Array:
    """Normalise the last dimension of x with the parameters ``name``, as ``config.norm`` says.

    - "rms": ``x / sqrt(mean(x^2) + eps) * scale`` (Zhang and Sennrich, 2019);
    - "rms_float32": the same, rounded to the stream's dtype only once it is scaled;
    - "rms_plus_one": the same with ``1 + scale``;
    - "layer": ``(x - mean(x)) / sqrt(var(x) + eps) * scale + bias`` (Ba et al., 2016).

    ``letter`` stands for the last dimension in the parameters' names.
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
    """Return activation(up(x)), [B, T, F] in the dtype of x; activation(gate(x)) * up(x) if gated (Shazeer, 2020).

    With ``config.gate_limit`` gate and up are clamped first, and up is raised by 1.
    """
    activation = ACTIVATIONS[config.activation]
    hidden = project_float32("...td,df->...tf", x_xTxD, weights["up_DxF"], weights.get("up_bias_F"))
    if config.gated:
        gate = project_float32("...td,df->...tf", x_xTxD, weights["gate_DxF"], weights.get("gate_bias_F"))
        if config.gate_limit is not None:
            gate = jnp.minimum(gate, config.gate_limit)
            hidden = jnp.clip(hidden, -config.gate_limit, config.gate_limit) + 1
        hidden = rules.product(rules.activation(gate, activation(gate)), hidden)
    else:
        hidden = rules.activation(hidden, activation(hidden))
    return hidden.astype(x_xTxD.dtype)


def mlp(
    config: DecoderConfig, rules: RunRules, weights: Weights, x_xTxD: jax.Array, hook: SiteHook | None = None
) -> jax.Array:
    """Return down(``mlp_neurons``(x)), [B, T, D]; the hook is called with the neurons."""
    hidden = mlp_neurons(config, rules, weights, x_xTxD)
    if hook is not None:
        hidden = hook(NEURONS, hidden)
    return project("...tf,fd->...td", hidden, weights["down_FxD"], weights.get("down_bias_D"))


def project(pattern: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return the ``einsum`` of x and weight by a pattern, plus the bias if there is one, in the dtype of x."""
    return project_float32(pattern, x, weight, bias).astype(x.dtype)


def project_float32(pattern: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return the product of x and weight by a pattern, plus the bias if there is one, in at least float32.

    XLA:CPU multiplies bfloat16 at twice the speed into fp32 sums.
    """
    y = einsum(pattern, x, weight)
    return y if bias is None else y + align_rank(bias, y)


def layer_of(stacked: jax.Array, layer: int | jax.Array) -> jax.Array:
    """Return one layer of a stacked parameter, or another slice along its first dimension."""
    # XLA:CPU slices bfloat16 in fp32. With the barrier, which ties the array to the layer's number, it converts the
    # slice; without, all layers before the scan: twice their memory, and a tenth of the time of a 2,000-token batch.
    if stacked.dtype == jnp.bfloat16 and not isinstance(layer, int):
        stacked, layer = lax.optimization_barrier((stacked, layer))
    return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


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

"""Configuration of a decoder: its sizes, the choices that change its formulas, and how it is differentiated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding (Su et al., 2021): the rotation per position of each pair of a head's dimensions."""

    #: angle per position of every pair, in radians. The first ``2 * len(frequencies)`` dimensions of a head rotate,
    #: dimension i with dimension ``i + len(frequencies)``; the rest do not.
    frequencies: tuple[float, ...]
    attention_scaling: float = 1.0  #: factor on cosine and sine


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder, whatever its family. Hashable, so that it can be a static argument of ``jax.jit``."""

    family: str  #: ``model_type`` of the checkpoint, a key of ``families.FAMILIES``
    n_layers: int  #: number of decoder layers (L)
    d_model: int  #: width of the residual stream (D)
    n_heads: int  #: query heads (H)
    n_kv_heads: int  #: key and value heads (N); each serves ``n_heads / n_kv_heads`` query heads (G)
    d_head: int  #: width of a head (K); need not be ``d_model / n_heads``
    d_mlp: int  #: hidden width of the MLP, or of each expert (F)
    vocab: int  #: rows of the embedding and number of logits (V)
    context: int  #: longest prompt in tokens (C)
    tied: bool  #: whether the unembedding is the embedding
    norm: str  #: "rms", "rms_float32", "rms_plus_one" or "layer", as ``layers.norm`` says
    norm_eps: float  #: added to the mean square or the variance inside the norms
    activation: str  #: a key of ``layers.ACTIVATIONS``
    gated: bool  #: whether the MLP is down(activation(gate(x)) * up(x)); otherwise down(activation(up(x)))
    score_scale: float  #: factor on the products of queries and keys
    #: whether the MLP reads the stream entering the layer, in parallel with attention, not the one after it.
    parallel: bool = False
    shared_norm: bool = False  #: whether attention and the MLP share one norm
    #: whether the outputs of attention and MLP are normalised before they are added to the stream.
    post_norms: bool = False
    pre_norms: bool = True  #: whether attention and the MLP read the stream after a norm, rather than the stream itself
    qk_norm: bool = False  #: whether queries and keys are normalised, head by head, before they are rotated
    qk_norm_joint: bool = False  #: whether that norm is over the values of all heads together
    n_experts: int = 0  #: experts of each MLP (E), of which a router chooses some for each token; 0: a plain MLP
    experts_per_token: int = 0  #: experts that are chosen
    #: whether the chosen experts' weights sum to 1; otherwise they are probabilities among all.
    normalize_experts: bool = False
    #: qkv_bias, o_bias, mlp_bias, unembed_bias: whether those projections have biases.
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    learned_positions: bool = False  #: whether a learned vector is added to the embedding of every position
    rope: Rope | None = None  #: rotary embedding; None: none
    sliding_rope: Rope | None = None  #: rotary embedding of layers with sliding windows; None: ``rope``
    #: for each layer, whether queries attend to the last ``sliding_window`` tokens only. Empty: none.
    sliding_layers: tuple[bool, ...] = ()
    sliding_window: int | None = None  #: number of those tokens, the query's own included
    scale_by_layer: bool = False  #: whether ``score_scale`` is divided by the layer's number, counted from 1
    attn_logit_softcap: float | None = None  #: attention scores s become ``cap * tanh(s / cap)``; None: no cap
    #: whether each head has a sink: a learned score of no key, which takes part of the softmax (gpt-oss).
    attn_sinks: bool = False
    #: limit of the gated product of gpt-oss, activation(min(gate(x), limit)) * (clip(up(x), -limit, limit) + 1); None:
    #: the plain one.
    gate_limit: float | None = None
    final_logit_softcap: float | None = None  #: the same for the logits
    embed_scale: float = 1.0  #: factor on the embeddings that enter the first layer, not on the unembedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchConfig(DecoderConfig):
    """A transformers model that runs in PyTorch: its sizes; fields of formulas mean nothing."""

    functions: Any  #: ``torch_model.TorchFunctions``, which the functions of ``decoder`` call; equal to itself only


@dataclasses.dataclass(frozen=True)
class RunRules:
    """Rules of differentiation, hashable so that they can be static under ``jax.jit``."""

    #: "gradient", of the function itself; "relp", by the rules of relevance patching (Jafari et al., 2025, arXiv
    #: 2508.21258): norm factors and attention weights are constants, an activation function is a constant multiple of
    #: its input, and a gated product passes half of the gradient to each factor.
    backward: str = "gradient"
    #: whether all prompts of a batch use the norm factors and attention weights of the first one. The one rule that
    #: changes outputs, also outputs of the other prompts.
    first_fixes: bool = False
    #: whether a gradient computes each layer again from the stream that enters it, which takes the least memory;
    #: otherwise it keeps the matrix products of the forward pass.
    remat: bool = False

    def factor(self, value: jax.Array) -> jax.Array:
        """Return a norm factor or attention scores: the first prompt's, or a constant, where the rules say so."""
        if self.first_fixes:  # before the gradient is stopped: other prompts get the first one's factor
            value = jnp.broadcast_to(value[:1], value.shape)
        return lax.stop_gradient(value) if self.backward == "relp" else value

    def activation(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return y, the output of an activation function for its input x, with the gradient of the rules."""
        if self.backward == "gradient":
            return y
        # The ratio y / x is a constant, so that the gradient is y / x; adding what is left keeps the value exactly y.
        linear = x * lax.stop_gradient(jnp.where(x == 0, 0.0, y / jnp.where(x == 0, 1.0, x)))
        return lax.stop_gradient(y - linear) + linear

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return a * b, as in a gated MLP, with the gradient of the rules."""
        if self.backward == "gradient":
            return a * b
        # Each factor gets half of the gradient, so that relevance is not counted twice.
        return 0.5 * (a * lax.stop_gradient(b) + lax.stop_gradient(a) * b)

    @property
    def remat_policy(self) -> Callable[..., bool]:
        """Return the rematerialisation policy: what a gradient keeps of a layer's forward pass."""
        policies = jax.checkpoint_policies
        return policies.nothing_saveable if self.remat else policies.dots_saveable


GRADIENT = RunRules()

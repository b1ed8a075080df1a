"""Phi-3 and Phi-4: Llama's layers, with query, key and value in one matrix, and gate and up in one."""

import math

import numpy as np

from saejax.models.config import DecoderConfig, Rope
from saejax.models.families.llama import WEIGHTS, read_sliding_everywhere, rms_decoder
from saejax.models.families.rotary import make_rope, rope_object
from saejax.models.families.table import Family, View, Weight, expect
from saejax.models.fields import Fields


def _read_phi3(fields: Fields) -> DecoderConfig:
    """Read a config; with LongRoPE, the context is the original one, for which the short factors are."""
    context, original = fields.size("max_position_embeddings"), fields.size("original_max_position_embeddings")
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.expect(name, False)
    d_head = fields.size("head_dim", fields.quotient("hidden_size", "num_attention_heads"))
    rope = rope_object(fields)
    theta = rope.first_number("rope_theta", 10_000.0, [(fields, "rope_theta")])
    share = rope.first_number("partial_rotary_factor", 1.0, [(fields, "partial_rotary_factor")])
    kind = rope.take("rope_type", str, "") or rope.take("type", str, "default")
    if kind in ("longrope", "su"):
        embedding = _longrope(rope, theta, int(d_head * share), context, original)
        context = min(context, original)
    elif kind == "default":
        embedding = make_rope(rope, theta, share, d_head, context)
    else:
        raise rope.refuse("rope_type", kind, "default or longrope")
    return rms_decoder(fields, "phi3", context=context, rope=embedding, **read_sliding_everywhere(fields))


def _longrope(rope: Fields, theta: float, width: int, context: int, original: int) -> Rope:
    """Divide each pair's frequency by a factor of its own (LongRoPE, Ding et al., 2024).

    There are two sets of factors; this is the one for prompts within the original context.
    """
    factors = np.array(rope.take("short_factor", list), np.float64)
    rope.ignore("type", "long_factor", "original_max_position_embeddings")
    if factors.shape != (width // 2,):
        raise rope.refuse("short_factor", f"with {len(factors)} numbers", f"{width // 2}, one for each rotated pair")
    # Attention is scaled up by the ratio of the contexts also for short prompts.
    factor = rope.first_number("factor", context / original)
    scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    frequencies = theta ** -(np.arange(0, width, 2) / width) / factors
    return Rope(tuple(frequencies.tolist()), rope.first_number("attention_factor", scaling))


def _part(part: int) -> View:
    """Return a view of query (0), key (1) or value (2) of the matrix [(heads + 2 x key-value heads) x width, in]."""

    def view(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        d_model, heads, width = shape
        start = len(tensor) - (3 - part) * heads * width if part else 0
        rest = start or len(tensor) - heads * width  # rows of others
        if tensor.ndim != 2 or tensor.shape[1] != d_model or rest <= 0 or rest % (width if part else 2 * width):
            raise ValueError(f"has shape {list(tensor.shape)}, expected query, key and value of width {d_model}")
        return tensor[start : start + heads * width].T.reshape(shape)

    return view


def _half(part: int) -> View:
    """Return a view of the gate (0) or the up projection (1), each [in, out], in the one matrix [2 x out, in]."""

    def view(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        d_model, d_mlp = shape
        return expect(tensor, (2 * d_mlp, d_model))[part * d_mlp : (part + 1) * d_mlp].T

    return view


_PHI3_WEIGHTS = WEIGHTS | {
    "layers.q_DxHxK": Weight("model.layers.{}.self_attn.qkv_proj.weight", _part(0)),
    "layers.k_DxNxK": Weight("model.layers.{}.self_attn.qkv_proj.weight", _part(1)),
    "layers.v_DxNxK": Weight("model.layers.{}.self_attn.qkv_proj.weight", _part(2)),
    "layers.gate_DxF": Weight("model.layers.{}.mlp.gate_up_proj.weight", _half(0)),
    "layers.up_DxF": Weight("model.layers.{}.mlp.gate_up_proj.weight", _half(1)),
}

FAMILIES = {
    "phi3": Family(
        _read_phi3,
        _PHI3_WEIGHTS,
        dict(
            hidden_act="silu",
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        ),
    )
}

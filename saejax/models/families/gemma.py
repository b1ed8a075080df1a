"""The Gemma families: norms that scale by one plus their weight, and a scaled embedding.

From Gemma 2 on, they also have norms after attention and the MLP, sliding windows and soft caps.
"""

import dataclasses
import math
from typing import Any

from saejax.models.config import DecoderConfig
from saejax.models.families.llama import WEIGHTS, read_sliding, rms_decoder
from saejax.models.families.rotary import FULL, SLIDING, read_ropes
from saejax.models.families.table import Family, norm_weights
from saejax.models.fields import Fields


def _gemma_decoder(fields: Fields, family: str, **differences: Any) -> DecoderConfig:
    """Return a decoder with what all Gemmas share, and some differences."""
    # Models that attend to later tokens too (embedding models) are no language models of this kind.
    fields.expect("use_bidirectional_attention", False)
    bias = fields.take("attention_bias", bool)
    scale = math.sqrt(fields.size("hidden_size"))
    return rms_decoder(
        fields, family, norm="rms_plus_one", embed_scale=scale, qkv_bias=bias, o_bias=bias, **differences
    )


def _read_gemma(fields: Fields) -> DecoderConfig:
    """Read a config of the first Gemma."""
    activation = fields.activation("hidden_act")
    if activation == "gelu":  # what the first releases say, meaning its tanh approximation
        activation = "gelu_tanh"
    if "hidden_activation" in fields and fields.activation("hidden_activation") != activation:
        raise fields.contradiction("'hidden_act'", "'hidden_activation'")
    return _gemma_decoder(fields, "gemma", activation=activation)


def _read_later(fields: Fields, family: str, **differences: Any) -> DecoderConfig:
    """Return a decoder with what Gemma 2 and 3 share, and some differences."""
    if "hidden_act" in fields and fields.activation("hidden_act") != fields.activation("hidden_activation"):
        raise fields.contradiction("'hidden_act'", "'hidden_activation'")
    return _gemma_decoder(
        fields,
        family,
        activation=fields.activation("hidden_activation"),
        post_norms=True,
        score_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        final_logit_softcap=fields.number_or_null("final_logit_softcapping"),
        **differences,
    )


def _read_gemma2(fields: Fields) -> DecoderConfig:
    """Read a config of Gemma 2, where every other layer has a sliding window."""
    fields.ignore("sliding_window_size")  # gemma-2-9b-it repeats the window under this name
    sliding = read_sliding(fields, fields.size_or_null("sliding_window"), lambda layer: FULL if layer % 2 else SLIDING)
    return _read_later(fields, "gemma2", attn_logit_softcap=fields.number_or_null("attn_logit_softcapping"), **sliding)


def _read_gemma3_text(fields: Fields, family: str = "gemma3_text") -> DecoderConfig:
    """Read a config of Gemma 3's language models, where all but every n-th layer have a sliding window."""
    fields.ignore("attn_logit_softcapping")  # transformers does not apply it
    period = fields.size("sliding_window_pattern")  # of the layers, each n-th attends to all tokens
    sliding = read_sliding(
        fields, fields.size_or_null("sliding_window"), lambda layer: SLIDING if (layer + 1) % period else FULL
    )
    sizes = fields.size("head_dim"), fields.size("max_position_embeddings")
    rope, sliding_rope = read_ropes(fields, *sizes, 1_000_000.0, 10_000.0, "rope_local_base_freq")
    return _read_later(fields, family, qk_norm=True, rope=rope, sliding_rope=sliding_rope, **sliding)


def _read_gemma3(fields: Fields) -> DecoderConfig:
    """Read the text part of a model that also reads images."""
    text = fields.part("text_config", _GEMMA3)
    fields.ignore("vision_config", "mm_tokens_per_image")
    tied = fields.take("tie_word_embeddings", bool)
    text.ignore("tie_word_embeddings")
    return dataclasses.replace(_read_gemma3_text(text, "gemma3"), tied=tied)


_LAYER = "model.layers.{}."
_LATER_WEIGHTS = WEIGHTS | norm_weights(
    attn_post_norm=_LAYER + "post_attention_layernorm",
    mlp_norm=_LAYER + "pre_feedforward_layernorm",
    mlp_post_norm=_LAYER + "post_feedforward_layernorm",
)

_SHARED: dict[str, Any] = dict(rms_norm_eps=1e-6, head_dim=256, attention_bias=False, tie_word_embeddings=True)
_LATER = _SHARED | dict(
    hidden_activation="gelu_pytorch_tanh", num_key_value_heads=4, query_pre_attn_scalar=256, sliding_window=4096
)
_GEMMA2 = _LATER | dict(max_position_embeddings=8192, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
_GEMMA3 = _LATER | dict(
    vocab_size=262_208,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    max_position_embeddings=131_072,
    sliding_window_pattern=6,
)

FAMILIES = {
    "gemma": Family(
        _read_gemma,
        WEIGHTS,
        _SHARED | dict(hidden_act="gelu_pytorch_tanh", num_key_value_heads=16, max_position_embeddings=8192),
    ),
    "gemma2": Family(_read_gemma2, _LATER_WEIGHTS, _GEMMA2),
    "gemma3_text": Family(_read_gemma3_text, _LATER_WEIGHTS, _GEMMA3),
    "gemma3": Family(_read_gemma3, _LATER_WEIGHTS, dict(tie_word_embeddings=True)),
}

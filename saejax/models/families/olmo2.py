"""OLMo 2 and 3: attention and the MLP read the stream itself; norms come after them, and over queries and keys.

Of OLMo 3 three of four layers have a sliding window and a plain rotary embedding.
"""

from typing import Any

from saejax.models.config import DecoderConfig
from saejax.models.families.llama import WEIGHTS, read_sliding, rms_decoder
from saejax.models.families.rotary import FULL, SLIDING, read_ropes
from saejax.models.families.table import Family, Weight, vector
from saejax.models.fields import Fields


def _read_olmo2(fields: Fields, family: str = "olmo2", **differences: Any) -> DecoderConfig:
    """Read a config of OLMo 2, or of a family that differs from it."""
    bias = fields.take("attention_bias", bool)
    norms = dict(norm="rms_float32", pre_norms=False, post_norms=True, qk_norm=True, qk_norm_joint=True)
    return rms_decoder(fields, family, **norms, qkv_bias=bias, o_bias=bias, **differences)


def _read_olmo3(fields: Fields) -> DecoderConfig:
    """Read a config of OLMo 3."""
    sliding = read_sliding(
        fields, fields.size_or_null("sliding_window"), lambda layer: SLIDING if (layer + 1) % 4 else FULL
    )
    sizes = fields.quotient("hidden_size", "num_attention_heads"), fields.size("max_position_embeddings")
    rope, sliding_rope = read_ropes(fields, *sizes, 500_000.0, 500_000.0, "rope_theta")
    return _read_olmo2(fields, "olmo3", rope=rope, sliding_rope=sliding_rope, **sliding)


_OLMO2_WEIGHTS = {name: weight for name, weight in WEIGHTS.items() if not name.endswith("_norm_K")} | {
    "layers.q_norm_HxK": Weight("model.layers.{}.self_attn.q_norm.weight", vector),
    "layers.k_norm_NxK": Weight("model.layers.{}.self_attn.k_norm.weight", vector),
    "layers.attn_post_norm_D": Weight("model.layers.{}.post_attention_layernorm.weight"),
    "layers.mlp_post_norm_D": Weight("model.layers.{}.post_feedforward_layernorm.weight"),
}

_DEFAULTS: dict[str, Any] = dict(
    hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-5, attention_bias=False, tie_word_embeddings=False
)

FAMILIES = {
    "olmo2": Family(_read_olmo2, _OLMO2_WEIGHTS, _DEFAULTS),
    "olmo3": Family(_read_olmo3, _OLMO2_WEIGHTS, _DEFAULTS | dict(sliding_window=4096)),
}

"""OLMo 2: attention and the MLP read the stream itself, and norms come after them, over queries and keys as well."""

from saejax.models.config import DecoderConfig
from saejax.models.families.llama import WEIGHTS, rms_decoder
from saejax.models.families.table import Family, Weight, vector
from saejax.models.fields import Fields


def _read_olmo2(fields: Fields) -> DecoderConfig:
    """Read a config of OLMo 2."""
    bias = fields.take("attention_bias", bool)
    return rms_decoder(
        fields, "olmo2", pre_norms=False, post_norms=True, qk_norm=True, qk_norm_joint=True, qkv_bias=bias, o_bias=bias
    )


_OLMO2_WEIGHTS = {name: weight for name, weight in WEIGHTS.items() if not name.endswith("_norm_K")} | {
    "layers.q_norm_HxK": Weight("model.layers.{}.self_attn.q_norm.weight", vector),
    "layers.k_norm_NxK": Weight("model.layers.{}.self_attn.k_norm.weight", vector),
    "layers.attn_post_norm_D": Weight("model.layers.{}.post_attention_layernorm.weight"),
    "layers.mlp_post_norm_D": Weight("model.layers.{}.post_feedforward_layernorm.weight"),
}

FAMILIES = {
    "olmo2": Family(
        _read_olmo2,
        _OLMO2_WEIGHTS,
        dict(
            hidden_act="silu",
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            attention_bias=False,
            tie_word_embeddings=False,
        ),
    )
}

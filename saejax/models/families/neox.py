"""GPT-NeoX (Pythia) and Phi: layer norms, a rotary embedding of part of each head, a plain MLP, parallel layers."""

from typing import Any

import numpy as np

from saejax.models.config import DecoderConfig
from saejax.models.families.rotary import read_rope
from saejax.models.families.table import Family, View, Weight, expect, linear, linear_weights, norm_weights
from saejax.models.fields import Fields


def _layer_norm_decoder(fields: Fields, family: str, d_head: int, **differences: Any) -> DecoderConfig:
    """Return a decoder with what GPT-NeoX and Phi share, and some differences."""
    return DecoderConfig(
        family=family,
        n_layers=fields.size("num_hidden_layers"),
        d_model=fields.size("hidden_size"),
        n_heads=fields.size("num_attention_heads"),
        n_kv_heads=fields.size("num_key_value_heads", fields.size("num_attention_heads")),
        d_head=d_head,
        d_mlp=fields.size("intermediate_size"),
        vocab=fields.size("vocab_size"),
        context=fields.size("max_position_embeddings"),
        tied=fields.take("tie_word_embeddings", bool),
        norm="layer",
        norm_eps=fields.number("layer_norm_eps"),
        activation=fields.activation("hidden_act"),
        gated=False,
        score_scale=d_head**-0.5,
        mlp_bias=True,
        **differences,
    )


def _read_gpt_neox(fields: Fields) -> DecoderConfig:
    """Read a config of GPT-NeoX."""
    # Its one matrix holds a query, a key and a value for each head: there are no shared keys.
    fields.expect("num_key_value_heads", fields.size("num_attention_heads"))
    d_head, context = fields.quotient("hidden_size", "num_attention_heads"), fields.size("max_position_embeddings")
    theta_names, share_names = ("rotary_emb_base", "rope_theta"), ("rotary_pct",)
    if "rotary_pct" in fields:
        fields.ignore("partial_rotary_factor")  # a copy; by itself, transformers does not read it
    bias = fields.take("attention_bias", bool)
    return _layer_norm_decoder(
        fields,
        "gpt_neox",
        d_head,
        rope=read_rope(fields, d_head, context, theta_names, share_names, 0.25),
        parallel=fields.take("use_parallel_residual", bool),
        qkv_bias=bias,
        o_bias=bias,
    )


def _read_phi(fields: Fields) -> DecoderConfig:
    """Read a config of Phi."""
    d_head, context = fields.quotient("hidden_size", "num_attention_heads"), fields.size("max_position_embeddings")
    return _layer_norm_decoder(
        fields,
        "phi",
        d_head,
        rope=read_rope(fields, d_head, context, share_names=("partial_rotary_factor",), default_share=0.5),
        parallel=True,
        shared_norm=True,
        qk_norm=fields.take("qk_layernorm", bool),
        qkv_bias=True,
        o_bias=True,
        unembed_bias=True,
    )


def _interleaved(part: int) -> View:
    """Return a view of query (0), key (1) or value (2) of GPT-NeoX's Linear, [heads x 3 x width, in], or its bias."""

    def view(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        *into, heads, width = shape
        # Query, key and value stand head by head, not as three blocks.
        rows = expect(tensor, (3 * heads * width, *into)).reshape(heads, 3, width, *into)[:, part]
        return np.moveaxis(rows, -1, 0) if into else rows

    return view


_NEOX, _PHI = "gpt_neox.layers.{}.", "model.layers.{}."
_NEOX_WEIGHTS = (
    {"embed_VxD": Weight("gpt_neox.embed_in.weight"), "unembed_DxV": Weight("embed_out.weight", linear)}
    | norm_weights(
        final_norm="gpt_neox.final_layer_norm",
        attn_norm=_NEOX + "input_layernorm",
        mlp_norm=_NEOX + "post_attention_layernorm",
    )
    | {
        f"layers.{name}": Weight(_NEOX + "attention.query_key_value.weight", _interleaved(part))
        for part, name in enumerate(("q_DxHxK", "k_DxNxK", "v_DxNxK"))
    }
    | {
        f"layers.{name}": Weight(_NEOX + "attention.query_key_value.bias", _interleaved(part))
        for part, name in enumerate(("q_bias_HxK", "k_bias_NxK", "v_bias_NxK"))
    }
    | linear_weights(_NEOX, o="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
)
_PHI_WEIGHTS = (
    {"embed_VxD": Weight("model.embed_tokens.weight"), "unembed_DxV": Weight("lm_head.weight", linear)}
    | {"unembed_bias_V": Weight("lm_head.bias")}
    | norm_weights(final_norm="model.final_layernorm", attn_norm=_PHI + "input_layernorm")
    | norm_weights("K", q_norm=_PHI + "self_attn.q_layernorm", k_norm=_PHI + "self_attn.k_layernorm")
    | linear_weights(_PHI, q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.dense")
    | linear_weights(_PHI, up="mlp.fc1", down="mlp.fc2")
)

_SHARED: dict[str, Any] = dict(max_position_embeddings=2048, layer_norm_eps=1e-5, tie_word_embeddings=False)

FAMILIES = {
    "gpt_neox": Family(
        _read_gpt_neox,
        _NEOX_WEIGHTS,
        _SHARED | dict(hidden_act="gelu", attention_bias=True, use_parallel_residual=True),
    ),
    "phi": Family(_read_phi, _PHI_WEIGHTS, _SHARED | dict(hidden_act="gelu_new", qk_layernorm=False)),
}

"""GPT-NeoX (Pythia) and Phi: layer norms, a rotary embedding of part of each head, a plain MLP, parallel layers."""

from typing import Any

import numpy as np

from saejax.models.config import DecoderConfig
from saejax.models.families.rotary import read_rope
from saejax.models.families.table import Family, View, Weight, expect, linear, linear_of_heads, vector
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
    theta_names, share_names = ("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor")
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
    share_names = ("partial_rotary_factor",)
    return _layer_norm_decoder(
        fields,
        "phi",
        d_head,
        rope=read_rope(fields, d_head, context, share_names=share_names, default_share=0.5),
        parallel=True,
        shared_norm=True,
        qk_norm=fields.take("qk_layernorm", bool),
        qkv_bias=True,
        o_bias=True,
        unembed_bias=True,
    )


def _interleaved(part: int) -> View:
    """Return a view of query (0), key (1) or value (2) of GPT-NeoX's one Linear, [heads x 3 x width, in]."""

    def view(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        d_model, heads, width = shape
        # Query, key and value stand head by head, not as three blocks.
        rows = expect(tensor, (3 * heads * width, d_model)).reshape(heads, 3, width, d_model)
        return rows[:, part].transpose(2, 0, 1)

    return view


def _interleaved_bias(part: int) -> View:
    """Return a view of query (0), key (1) or value (2) of the one bias [heads x 3 x width]."""

    def view(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        heads, width = shape
        return expect(tensor, (3 * heads * width,)).reshape(heads, 3, width)[:, part]

    return view


_NEOX_WEIGHTS = {
    "embed_VxD": Weight("gpt_neox.embed_in.weight"),
    "final_norm_D": Weight("gpt_neox.final_layer_norm.weight"),
    "final_norm_bias_D": Weight("gpt_neox.final_layer_norm.bias"),
    "unembed_DxV": Weight("embed_out.weight", linear),
    "layers.attn_norm_D": Weight("gpt_neox.layers.{}.input_layernorm.weight"),
    "layers.attn_norm_bias_D": Weight("gpt_neox.layers.{}.input_layernorm.bias"),
    "layers.q_DxHxK": Weight("gpt_neox.layers.{}.attention.query_key_value.weight", _interleaved(0)),
    "layers.k_DxNxK": Weight("gpt_neox.layers.{}.attention.query_key_value.weight", _interleaved(1)),
    "layers.v_DxNxK": Weight("gpt_neox.layers.{}.attention.query_key_value.weight", _interleaved(2)),
    "layers.o_HxKxD": Weight("gpt_neox.layers.{}.attention.dense.weight", linear_of_heads),
    "layers.q_bias_HxK": Weight("gpt_neox.layers.{}.attention.query_key_value.bias", _interleaved_bias(0)),
    "layers.k_bias_NxK": Weight("gpt_neox.layers.{}.attention.query_key_value.bias", _interleaved_bias(1)),
    "layers.v_bias_NxK": Weight("gpt_neox.layers.{}.attention.query_key_value.bias", _interleaved_bias(2)),
    "layers.o_bias_D": Weight("gpt_neox.layers.{}.attention.dense.bias"),
    "layers.mlp_norm_D": Weight("gpt_neox.layers.{}.post_attention_layernorm.weight"),
    "layers.mlp_norm_bias_D": Weight("gpt_neox.layers.{}.post_attention_layernorm.bias"),
    "layers.up_DxF": Weight("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", linear),
    "layers.up_bias_F": Weight("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias"),
    "layers.down_FxD": Weight("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", linear),
    "layers.down_bias_D": Weight("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias"),
}

_PHI_WEIGHTS = {
    "embed_VxD": Weight("model.embed_tokens.weight"),
    "final_norm_D": Weight("model.final_layernorm.weight"),
    "final_norm_bias_D": Weight("model.final_layernorm.bias"),
    "unembed_DxV": Weight("lm_head.weight", linear),
    "unembed_bias_V": Weight("lm_head.bias"),
    "layers.attn_norm_D": Weight("model.layers.{}.input_layernorm.weight"),
    "layers.attn_norm_bias_D": Weight("model.layers.{}.input_layernorm.bias"),
    "layers.q_DxHxK": Weight("model.layers.{}.self_attn.q_proj.weight", linear),
    "layers.k_DxNxK": Weight("model.layers.{}.self_attn.k_proj.weight", linear),
    "layers.v_DxNxK": Weight("model.layers.{}.self_attn.v_proj.weight", linear),
    "layers.o_HxKxD": Weight("model.layers.{}.self_attn.dense.weight", linear_of_heads),
    "layers.q_bias_HxK": Weight("model.layers.{}.self_attn.q_proj.bias", vector),
    "layers.k_bias_NxK": Weight("model.layers.{}.self_attn.k_proj.bias", vector),
    "layers.v_bias_NxK": Weight("model.layers.{}.self_attn.v_proj.bias", vector),
    "layers.o_bias_D": Weight("model.layers.{}.self_attn.dense.bias"),
    "layers.q_norm_K": Weight("model.layers.{}.self_attn.q_layernorm.weight"),
    "layers.q_norm_bias_K": Weight("model.layers.{}.self_attn.q_layernorm.bias"),
    "layers.k_norm_K": Weight("model.layers.{}.self_attn.k_layernorm.weight"),
    "layers.k_norm_bias_K": Weight("model.layers.{}.self_attn.k_layernorm.bias"),
    "layers.up_DxF": Weight("model.layers.{}.mlp.fc1.weight", linear),
    "layers.up_bias_F": Weight("model.layers.{}.mlp.fc1.bias"),
    "layers.down_FxD": Weight("model.layers.{}.mlp.fc2.weight", linear),
    "layers.down_bias_D": Weight("model.layers.{}.mlp.fc2.bias"),
}

_SHARED: dict[str, Any] = dict(max_position_embeddings=2048, layer_norm_eps=1e-5, tie_word_embeddings=False)

FAMILIES = {
    "gpt_neox": Family(
        _read_gpt_neox,
        _NEOX_WEIGHTS,
        _SHARED | dict(hidden_act="gelu", attention_bias=True, use_parallel_residual=True),
    ),
    "phi": Family(
        _read_phi,
        _PHI_WEIGHTS,
        _SHARED | dict(hidden_act="gelu_new", qk_layernorm=False),
    ),
}

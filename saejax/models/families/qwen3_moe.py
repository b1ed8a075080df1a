"""Qwen 3's mixtures of experts: Qwen 3 with a router and experts in place of each MLP."""

from saejax.models.config import DecoderConfig
from saejax.models.families.llama import WEIGHTS, read_sliding_everywhere, rms_decoder
from saejax.models.families.table import Family, Weight, linear
from saejax.models.fields import Fields


def _read_qwen3_moe(fields: Fields) -> DecoderConfig:
    """Read a config of Qwen 3's mixtures of experts, all of whose layers have a router."""
    fields.expect("mlp_only_layers", [])
    fields.expect("decoder_sparse_step", 1)
    fields.ignore("router_aux_loss_coef", "max_window_layers")
    bias = fields.take("attention_bias", bool)
    n_experts = fields.size_or_null("num_local_experts") or fields.size("num_experts")
    fields.ignore("num_experts")  # transformers 5 saves the other name
    sliding = read_sliding_everywhere(fields) if fields.take("use_sliding_window", bool) else {}
    fields.ignore("sliding_window")
    return rms_decoder(
        fields,
        "qwen3_moe",
        d_mlp=fields.size("moe_intermediate_size"),
        n_experts=n_experts,
        experts_per_token=fields.size("num_experts_per_tok"),
        normalize_experts=fields.take("norm_topk_prob", bool),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        **sliding,
    )


_MOE_WEIGHTS = {name: weight for name, weight in WEIGHTS.items() if ".mlp." not in weight.name} | {
    "layers.router_DxE": Weight("model.layers.{}.mlp.gate.weight", linear),
    "layers.gate_ExDxF": Weight("model.layers.{}.mlp.experts.{}.gate_proj.weight", linear),
    "layers.up_ExDxF": Weight("model.layers.{}.mlp.experts.{}.up_proj.weight", linear),
    "layers.down_ExFxD": Weight("model.layers.{}.mlp.experts.{}.down_proj.weight", linear),
}

FAMILIES = {
    "qwen3_moe": Family(
        _read_qwen3_moe,
        _MOE_WEIGHTS,
        dict(
            hidden_act="silu",
            intermediate_size=6144,
            num_key_value_heads=4,
            max_position_embeddings=32_768,
            rms_norm_eps=1e-6,
            use_sliding_window=False,
            sliding_window=4096,
            attention_bias=False,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            tie_word_embeddings=False,
        ),
    )
}

"""gpt-oss: a mixture of experts with biases, a clamped gate, and a sink in every attention head."""

import numpy as np

from saejax.models.config import DecoderConfig
from saejax.models.families.llama import WEIGHTS, read_sliding, rms_decoder
from saejax.models.families.rotary import FULL, SLIDING, read_rope
from saejax.models.families.table import Family, View, Weight, expect, linear
from saejax.models.fields import Fields


def _read_gpt_oss(fields: Fields) -> DecoderConfig:
    """Read a config of gpt-oss; its published weights are quantised, and copies in bfloat16 are not."""
    fields.ignore("hidden_act", "router_aux_loss_coef", "experts_per_token", "initial_context_length")
    fields.expect("swiglu_alpha", 1.702)  # of the activation quick_gelu
    bias, window = fields.take("attention_bias", bool), fields.size_or_null("sliding_window")
    rope = read_rope(fields, fields.size("head_dim"), fields.size("max_position_embeddings"), default_theta=150_000.0)
    return rms_decoder(
        fields,
        "gpt_oss",
        norm="rms_float32",
        rope=rope,
        activation="quick_gelu",
        gate_limit=fields.number("swiglu_limit"),
        n_experts=fields.size("num_local_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        normalize_experts=True,  # their softmax is over the chosen experts' logits alone
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        attn_sinks=True,
        **read_sliding(fields, window, lambda layer: FULL if layer % 2 else SLIDING),
    )


def _every_second(part: int) -> View:
    """Return a view of the gate (0) or the up projection (1), whose columns alternate in one tensor [..., 2 x F]."""

    def view(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return expect(tensor, (*shape[:-1], 2 * shape[-1]))[..., part::2]

    return view


_MLP = "model.layers.{}.mlp."
_GPT_OSS_WEIGHTS = {name: weight for name, weight in WEIGHTS.items() if ".mlp." not in weight.name} | {
    "layers.sinks_H": Weight("model.layers.{}.self_attn.sinks"),
    "layers.router_DxE": Weight(_MLP + "router.weight", linear),
    "layers.router_bias_E": Weight(_MLP + "router.bias"),
    "layers.gate_ExDxF": Weight(_MLP + "experts.gate_up_proj", _every_second(0)),
    "layers.up_ExDxF": Weight(_MLP + "experts.gate_up_proj", _every_second(1)),
    "layers.gate_bias_ExF": Weight(_MLP + "experts.gate_up_proj_bias", _every_second(0)),
    "layers.up_bias_ExF": Weight(_MLP + "experts.gate_up_proj_bias", _every_second(1)),
    "layers.down_ExFxD": Weight(_MLP + "experts.down_proj"),
    "layers.down_bias_ExD": Weight(_MLP + "experts.down_proj_bias"),
}

FAMILIES = {
    "gpt_oss": Family(
        _read_gpt_oss,
        _GPT_OSS_WEIGHTS,
        dict(
            num_hidden_layers=36,
            num_local_experts=128,
            num_experts_per_tok=4,
            vocab_size=201_088,
            hidden_size=2880,
            intermediate_size=2880,
            head_dim=64,
            num_attention_heads=64,
            num_key_value_heads=8,
            sliding_window=128,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
            swiglu_limit=7.0,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="yarn",
                factor=32.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=4096,
            ),
        ),
    )
}

"""SmolLM3: Llama's layers, of which every fourth has no rotary embedding."""

import dataclasses

from saejax.models.config import DecoderConfig, Rope
from saejax.models.families.llama import WEIGHTS, rms_decoder
from saejax.models.families.rotary import FULL, SLIDING, read_rope
from saejax.models.families.table import Family
from saejax.models.fields import Fields


def _read_smollm3(fields: Fields) -> DecoderConfig:
    """Read layers without a rotary embedding as sliding ones, whose embedding does not rotate.

    Their window is the whole context, or the model's where these same layers have one.
    """
    n_layers, context = fields.size("num_hidden_layers"), fields.size("max_position_embeddings")
    interval = fields.size("no_rope_layer_interval")
    rotated = fields.take("no_rope_layers", list, [(layer + 1) % interval for layer in range(n_layers)])
    if len(rotated) != n_layers:
        raise fields.contradiction(f"'no_rope_layers' ({len(rotated)} of them)", f"'num_hidden_layers' ({n_layers})")
    plain = tuple(not layer for layer in rotated)
    window = fields.size_or_null("sliding_window") if fields.take("use_sliding_window", bool) else None
    kinds = [SLIDING if window and is_plain else FULL for is_plain in plain]
    if window and fields.take("layer_types", list, kinds) != kinds:
        raise fields.refuse("layer_types", "with other sliding layers", "those without a rotary embedding")
    fields.ignore("layer_types", "max_window_layers")  # without effect where no window is used, and never
    d_head = fields.size("head_dim", fields.quotient("hidden_size", "num_attention_heads"))
    rope = read_rope(fields, d_head, context, default_theta=2_000_000.0)
    bias = fields.take("attention_bias", bool)
    config = rms_decoder(
        fields, "smollm3", rope=rope, qkv_bias=bias, o_bias=bias, mlp_bias=fields.take("mlp_bias", bool)
    )
    if not any(plain):
        return config
    # Frequencies of 0 rotate nothing: one program serves both kinds of layers.
    still = Rope((0.0,) * len(rope.frequencies))
    return dataclasses.replace(config, sliding_layers=plain, sliding_window=window or context, sliding_rope=still)


FAMILIES = {
    "smollm3": Family(
        _read_smollm3,
        WEIGHTS,
        dict(
            hidden_act="silu",
            num_key_value_heads=4,
            max_position_embeddings=32_768,
            rms_norm_eps=1e-6,
            use_sliding_window=False,
            no_rope_layer_interval=4,
            attention_bias=False,
            mlp_bias=False,
            tie_word_embeddings=True,
        ),
    )
}

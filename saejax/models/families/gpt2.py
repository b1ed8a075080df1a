"""GPT-2: layer norms, learned positions, a plain MLP, and query, key and value in one matrix."""

import numpy as np

from saejax.models.config import DecoderConfig
from saejax.models.families.table import Family, View, Weight, expect, linear, norm_weights
from saejax.models.fields import Fields


def _read_gpt2(fields: Fields) -> DecoderConfig:
    """Read a config of GPT-2."""
    context, d_head = fields.size("n_positions"), fields.quotient("n_embd", "n_head")
    fields.ignore("reorder_and_upcast_attn")  # scores in fp32, which they are here in any case
    return DecoderConfig(
        family="gpt2",
        n_layers=fields.size("n_layer"),
        d_model=fields.size("n_embd"),
        n_heads=fields.size("n_head"),
        n_kv_heads=fields.size("n_head"),
        d_head=d_head,
        d_mlp=fields.size("n_inner", 4 * fields.size("n_embd")),
        vocab=fields.size("vocab_size"),
        context=context,
        tied=fields.take("tie_word_embeddings", bool),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon"),
        activation=fields.activation("activation_function"),
        gated=False,
        score_scale=d_head**-0.5 if fields.take("scale_attn_weights", bool) else 1.0,
        scale_by_layer=fields.take("scale_attn_by_inverse_layer_idx", bool),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        learned_positions=True,
    )


def _part(part: int) -> View:
    """Return a view of query (0), key (1) or value (2) of the one matrix [in, 3 x heads x width], or of its bias."""

    def view(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        *into, heads, width = shape
        return expect(tensor, (*into, 3 * heads * width)).reshape(*into, 3, heads, width)[..., part, :, :]

    return view


def _heads_out(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a matrix [heads x width, out] by heads."""
    return expect(tensor, (shape[0] * shape[1], shape[2])).reshape(shape)


# GPT-2's Conv1D keeps matrices as [in, out]: only the head is a Linear, and is transposed.
_LAYER = "transformer.h.{}."
_GPT2_WEIGHTS = (
    {"embed_VxD": Weight("transformer.wte.weight"), "position_CxD": Weight("transformer.wpe.weight")}
    | {"unembed_DxV": Weight("lm_head.weight", linear)}
    | norm_weights(final_norm="transformer.ln_f", attn_norm=_LAYER + "ln_1", mlp_norm=_LAYER + "ln_2")
    | {
        f"layers.{name}": Weight(_LAYER + "attn.c_attn.weight", _part(part))
        for part, name in enumerate(("q_DxHxK", "k_DxNxK", "v_DxNxK"))
    }
    | {
        f"layers.{name}": Weight(_LAYER + "attn.c_attn.bias", _part(part))
        for part, name in enumerate(("q_bias_HxK", "k_bias_NxK", "v_bias_NxK"))
    }
    | {
        "layers.o_HxKxD": Weight(_LAYER + "attn.c_proj.weight", _heads_out),
        "layers.o_bias_D": Weight(_LAYER + "attn.c_proj.bias"),
        "layers.up_DxF": Weight(_LAYER + "mlp.c_fc.weight"),
        "layers.up_bias_F": Weight(_LAYER + "mlp.c_fc.bias"),
        "layers.down_FxD": Weight(_LAYER + "mlp.c_proj.weight"),
        "layers.down_bias_D": Weight(_LAYER + "mlp.c_proj.bias"),
    }
)

FAMILIES = {
    "gpt2": Family(
        _read_gpt2,
        _GPT2_WEIGHTS,
        dict(
            n_positions=1024,
            layer_norm_epsilon=1e-5,
            activation_function="gelu_new",
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            tie_word_embeddings=True,
        ),
    )
}

"""Llama and the families built like it: Mistral, Qwen 2 and Qwen 3."""

from collections.abc import Callable
from typing import Any, TypedDict

from saejax.models.config import DecoderConfig
from saejax.models.families.rotary import FULL, SLIDING, read_rope
from saejax.models.families.table import Family, Weight, linear, linear_weights, norm_weights
from saejax.models.fields import Fields


def rms_decoder(fields: Fields, family: str, **differences: Any) -> DecoderConfig:
    """Return a decoder with RMS norms, rotary embeddings and a gated MLP.

    Args:
      fields: fields of the config.
      family: its ``model_type``.
      differences: fields of ``DecoderConfig`` in which this family differs from Llama.
    """
    n_heads, context = fields.size("num_attention_heads"), fields.size("max_position_embeddings")
    has_head_dim = "head_dim" in fields
    d_head = fields.size("head_dim") if has_head_dim else fields.quotient("hidden_size", "num_attention_heads")
    shared: dict[str, Any] = dict(
        n_layers=fields.size("num_hidden_layers"),
        d_model=fields.size("hidden_size"),
        n_heads=n_heads,
        n_kv_heads=fields.size("num_key_value_heads", n_heads),
        d_head=d_head,
        d_mlp=fields.size("intermediate_size"),
        vocab=fields.size("vocab_size"),
        context=context,
        tied=fields.take("tie_word_embeddings", bool),
        norm="rms",
        norm_eps=fields.number("rms_norm_eps"),
        gated=True,
        score_scale=d_head**-0.5,
    )
    if "activation" not in differences:
        shared["activation"] = fields.activation("hidden_act")
    if "rope" not in differences:
        shared["rope"] = read_rope(fields, d_head, context)
    return DecoderConfig(family=family, **shared | differences)


class SlidingLayers(TypedDict, total=False):
    """Fields of ``DecoderConfig``; none where no layer is local."""

    sliding_layers: tuple[bool, ...]
    sliding_window: int


def read_sliding(fields: Fields, window: int | None, kind_of: Callable[[int], str]) -> SlidingLayers:
    """Read which layers have a sliding window.

    Args:
      fields: fields of the config.
      window: tokens that a local layer sees; None: there can be no local layers.
      kind_of: the kind of each layer, where the config does not list them in "layer_types".
    """
    n_layers = fields.size("num_hidden_layers")
    kinds = fields.take("layer_types", list, [kind_of(layer) for layer in range(n_layers)])
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise fields.refuse("layer_types", kind, f"'{FULL}' or '{SLIDING}'")
    if len(kinds) != n_layers:
        raise fields.contradiction(f"'layer_types' ({len(kinds)} of them)", f"'num_hidden_layers' ({n_layers})")
    # Some configs give a window that no layer uses.
    if SLIDING not in kinds:
        return SlidingLayers()
    if window is None:
        raise fields.contradiction(f"'layer_types' (with '{SLIDING}')", "'sliding_window' (null or switched off)")
    return SlidingLayers(sliding_layers=tuple(kind == SLIDING for kind in kinds), sliding_window=window)


def _read_llama(fields: Fields) -> DecoderConfig:
    """Read a config of Llama."""
    fields.expect("rope_interleaved", False)
    bias = fields.take("attention_bias", bool)
    mlp_bias = fields.take("mlp_bias", bool)
    return rms_decoder(fields, "llama", qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def read_sliding_everywhere(fields: Fields) -> SlidingLayers:
    """Read a sliding window that all layers have, or none."""
    window = fields.size_or_null("sliding_window")
    if window is None:
        return SlidingLayers()
    return SlidingLayers(sliding_layers=(True,) * fields.size("num_hidden_layers"), sliding_window=window)


def _read_mistral(fields: Fields) -> DecoderConfig:
    """Read a config of Mistral."""
    return rms_decoder(fields, "mistral", **read_sliding_everywhere(fields))


def _read_qwen2(fields: Fields) -> DecoderConfig:
    """Read a config of Qwen 2."""
    return rms_decoder(fields, "qwen2", qkv_bias=True, **_read_qwen_sliding(fields))


def _read_qwen3(fields: Fields) -> DecoderConfig:
    """Read a config of Qwen 3."""
    bias = fields.take("attention_bias", bool)
    return rms_decoder(fields, "qwen3", qk_norm=True, qkv_bias=bias, o_bias=bias, **_read_qwen_sliding(fields))


def _read_qwen_sliding(fields: Fields) -> SlidingLayers:
    """Read which layers of a Qwen have a sliding window: none, or those from a number on."""
    fields.expect("use_mrope", False)
    window, first = fields.size_or_null("sliding_window"), fields.take("max_window_layers", int)
    # Qwen states a window and switches it off by another field.
    if not fields.take("use_sliding_window", bool):
        window = None
    return read_sliding(fields, window, lambda layer: FULL if window is None or layer < first else SLIDING)


_LAYER = "model.layers.{}."
WEIGHTS = (
    {"embed_VxD": Weight("model.embed_tokens.weight"), "unembed_DxV": Weight("lm_head.weight", linear)}
    | norm_weights(
        final_norm="model.norm", attn_norm=_LAYER + "input_layernorm", mlp_norm=_LAYER + "post_attention_layernorm"
    )
    | norm_weights("K", q_norm=_LAYER + "self_attn.q_norm", k_norm=_LAYER + "self_attn.k_norm")
    | linear_weights(_LAYER, q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj")
    | linear_weights(_LAYER, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
)

_SHARED: dict[str, Any] = dict(rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False)
_QWEN = _SHARED | dict(
    num_key_value_heads=32,
    max_position_embeddings=32_768,
    sliding_window=4096,
    max_window_layers=28,
    use_sliding_window=False,
)
FAMILIES = {
    "llama": Family(
        _read_llama, WEIGHTS, _SHARED | dict(max_position_embeddings=2048, attention_bias=False, mlp_bias=False)
    ),
    "mistral": Family(
        _read_mistral,
        WEIGHTS,
        _SHARED | dict(num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096),
    ),
    "qwen2": Family(_read_qwen2, WEIGHTS, _QWEN),
    "qwen3": Family(_read_qwen3, WEIGHTS, _QWEN | dict(head_dim=128, attention_bias=False)),
}

"""GPT-Neo (TinyStories): GPT-2's layers with local attention in some, and scores that are not scaled."""

from saejax.models.config import DecoderConfig
from saejax.models.families.table import Family, Weight, linear, linear_weights, norm_weights
from saejax.models.fields import Fields


def _read_gpt_neo(fields: Fields) -> DecoderConfig:
    """Read a config of GPT-Neo, whose layers alternate between full and local attention as a pattern says."""
    n_layers, n_heads, d_model = (fields.size(name) for name in ("num_layers", "num_heads", "hidden_size"))
    kinds = [kind for pattern, times in fields.take("attention_types", list) for kind in list(pattern) * times]
    if fields.take("attention_layers", list, kinds) != kinds:  # the same, written out
        raise fields.contradiction("'attention_types'", "'attention_layers'")
    if len(kinds) != n_layers:
        raise fields.contradiction(f"'attention_types' (for {len(kinds)} layers)", f"'num_layers' ({n_layers})")
    for kind in kinds:
        if kind not in ("global", "local"):
            raise fields.refuse("attention_types", kind, "'global' or 'local'")
    local = tuple(kind == "local" for kind in kinds)
    return DecoderConfig(
        family="gpt_neo",
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=fields.quotient("hidden_size", "num_heads"),
        d_mlp=fields.size("intermediate_size", 4 * d_model),
        vocab=fields.size("vocab_size"),
        context=fields.size("max_position_embeddings"),
        tied=fields.take("tie_word_embeddings", bool),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon"),
        activation=fields.activation("activation_function"),
        gated=False,
        score_scale=1.0,
        sliding_layers=local if any(local) else (),
        sliding_window=fields.size("window_size") if any(local) else None,
        o_bias=True,
        mlp_bias=True,
        learned_positions=True,
    )


_LAYER = "transformer.h.{}."
_GPT_NEO_WEIGHTS = (
    {"embed_VxD": Weight("transformer.wte.weight"), "position_CxD": Weight("transformer.wpe.weight")}
    | {"unembed_DxV": Weight("lm_head.weight", linear)}
    | norm_weights(final_norm="transformer.ln_f", attn_norm=_LAYER + "ln_1", mlp_norm=_LAYER + "ln_2")
    | linear_weights(_LAYER + "attn.attention.", q="q_proj", k="k_proj", v="v_proj", o="out_proj")
    | linear_weights(_LAYER, up="mlp.c_fc", down="mlp.c_proj")
)

FAMILIES = {
    "gpt_neo": Family(
        _read_gpt_neo,
        _GPT_NEO_WEIGHTS,
        dict(
            num_layers=24,
            num_heads=16,
            attention_types=[[["global", "local"], 12]],
            window_size=256,
            max_position_embeddings=2048,
            activation_function="gelu_new",
            layer_norm_epsilon=1e-5,
            tie_word_embeddings=True,
        ),
    )
}

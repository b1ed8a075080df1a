"""The parameters of a decoder: names, shapes, and how they are split over the mesh."""

from saejax.models.config import DecoderConfig

Table = dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]

LAYERS = "layers."  # what the names of stacked parameters start with


def parameter_table(config: DecoderConfig) -> Table:
    """Return every parameter's name and shape, and the mesh axis over which each dimension is split.

    Names that start with "layers." are stacked: their first dimension counts layers.
    """
    table: Table = {"embed_VxD": ((config.vocab, config.d_model), ("model", None))}
    # Not split: a prompt's rows are looked up on every device.
    if config.learned_positions:
        table["position_CxD"] = ((config.context, config.d_model), (None, None))
    table |= _norm(config, "final_norm", config.d_model, "D")
    if not config.tied:
        table["unembed_DxV"] = ((config.d_model, config.vocab), (None, "model"))
    if config.unembed_bias:
        table["unembed_bias_V"] = ((config.vocab,), ("model",))
    layer = _norms(config) | _attention(config) | _mlp(config)
    return table | {LAYERS + name: ((config.n_layers, *shape), (None, *axes)) for name, (shape, axes) in layer.items()}


def _norm(config: DecoderConfig, name: str, width: int, letter: str) -> Table:
    """Return the parameters of a norm over vectors of a width."""
    table: Table = {f"{name}_{letter}": ((width,), (None,))}
    if config.norm == "layer":
        table[f"{name}_bias_{letter}"] = ((width,), (None,))
    return table


def _norms(config: DecoderConfig) -> Table:
    """Return the parameters of a layer's norms."""
    table: Table = {}
    if config.pre_norms:
        table |= _norm(config, "attn_norm", config.d_model, "D")
    if config.pre_norms and not config.shared_norm:
        table |= _norm(config, "mlp_norm", config.d_model, "D")
    if config.post_norms:
        table |= _norm(config, "attn_post_norm", config.d_model, "D")
        table |= _norm(config, "mlp_post_norm", config.d_model, "D")
    if config.qk_norm and config.qk_norm_joint:
        table["q_norm_HxK"] = ((config.n_heads, config.d_head), (None, None))
        table["k_norm_NxK"] = ((config.n_kv_heads, config.d_head), (None, None))
    elif config.qk_norm:
        table |= _norm(config, "q_norm", config.d_head, "K") | _norm(config, "k_norm", config.d_head, "K")
    return table


def _attention(config: DecoderConfig) -> Table:
    """Return the parameters of a layer's attention; heads are split over ``model``."""
    d, h, n, k = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
    table: Table = {
        "q_DxHxK": ((d, h, k), (None, "model", None)),
        "k_DxNxK": ((d, n, k), (None, "model", None)),
        "v_DxNxK": ((d, n, k), (None, "model", None)),
        "o_HxKxD": ((h, k, d), ("model", None, None)),
    }
    if config.qkv_bias:
        table["q_bias_HxK"] = ((h, k), ("model", None))
        table["k_bias_NxK"] = ((n, k), ("model", None))
        table["v_bias_NxK"] = ((n, k), ("model", None))
    if config.attn_sinks:
        table["sinks_H"] = ((h,), ("model",))
    if config.o_bias:
        table["o_bias_D"] = ((d,), (None,))
    return table


def _mlp(config: DecoderConfig) -> Table:
    """Return the parameters of a layer's MLP, or of router and experts; the hidden width is split over ``model``."""
    d, f, e = config.d_model, config.d_mlp, config.n_experts
    if e:
        table: Table = {
            # Not split: every device needs the probabilities of all experts to choose some.
            "router_DxE": ((d, e), (None, None)),
            # Split over the hidden width, not over experts: every device has work, whichever are chosen.
            "gate_ExDxF": ((e, d, f), (None, None, "model")),
            "up_ExDxF": ((e, d, f), (None, None, "model")),
            "down_ExFxD": ((e, f, d), (None, "model", None)),
        }
        if config.mlp_bias:
            table |= {
                "router_bias_E": ((e,), (None,)),
                "gate_bias_ExF": ((e, f), (None, "model")),
                "up_bias_ExF": ((e, f), (None, "model")),
                "down_bias_ExD": ((e, d), (None, None)),
            }
        return table
    table = {}
    for name in ("gate", "up") if config.gated else ("up",):
        table[f"{name}_DxF"] = ((d, f), (None, "model"))
        if config.mlp_bias:
            table[f"{name}_bias_F"] = ((f,), ("model",))
    table["down_FxD"] = ((f, d), ("model", None))
    if config.mlp_bias:
        table["down_bias_D"] = ((d,), (None,))
    return table

"""What the decoder has to know of a model: sizes and the choices that change its formulas."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal decoder, whatever its family. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
      family: ``model_type`` of the checkpoint, a key of ``families.FAMILIES``.
      n_layers: number of decoder layers.
      d_model: width of the residual stream (D).
      n_heads: query heads (H).
      n_kv_heads: key and value heads (N); each serves ``n_heads / n_kv_heads`` query heads (G).
      d_head: width of a head (K); need not be ``d_model / n_heads``.
      d_mlp: hidden width of the MLP (F).
      vocab: rows of the embedding and number of logits (V).
      context: longest prompt in tokens.
      norm_eps: added to the mean square inside the norms.
      activation: a key of ``decoder.ACTIVATIONS``.
      rope_theta: base of the rotary embedding's wavelengths.
      attention_bias: whether the query, key, value and output projections have biases.
      mlp_bias: whether the MLP's projections have biases.
      tied: whether the unembedding is the embedding.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int
    context: int
    norm_eps: float
    activation: str
    rope_theta: float
    attention_bias: bool
    mlp_bias: bool
    tied: bool

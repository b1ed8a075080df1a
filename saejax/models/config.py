"""What the decoder has to know of a model: sizes, and the choices that change its formulas. ``rules`` has the rest."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding (Su et al., 2021): how fast each pair of a head's dimensions turns with the position.

    Attributes:
      frequencies: angle per position of every pair, in radians. The first ``2 * len(frequencies)`` dimensions of a
        head turn, dimension i with dimension ``i + len(frequencies)``; the rest stay.
      gain: factor on cosine and sine.
    """

    frequencies: tuple[float, ...]
    gain: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder, whatever its family. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
      family: ``model_type`` of the checkpoint, a key of ``families.FAMILIES``.
      n_layers: number of decoder layers (L).
      d_model: width of the residual stream (D).
      n_heads: query heads (H).
      n_kv_heads: key and value heads (N); each serves ``n_heads / n_kv_heads`` query heads (G).
      d_head: width of a head (K); need not be ``d_model / n_heads``.
      d_mlp: hidden width of the MLP (F).
      vocab: rows of the embedding and number of logits (V).
      context: longest prompt in tokens (C).
      tied: whether the unembedding is the embedding.
      norm: "rms", "rms_plus_one" or "layer", as ``layers.norm`` says.
      norm_eps: added to the mean square or the variance inside the norms.
      activation: a key of ``layers.ACTIVATIONS``.
      gated: whether the MLP is down(activation(gate(x)) * up(x)); otherwise down(activation(up(x))).
      parallel: whether the MLP reads the stream that enters the layer, as attention does, not the one it leaves.
      shared_norm: whether the MLP reads what attention reads, without a norm of its own.
      post_norms: whether what attention and the MLP give is normed before it is added to the stream.
      qk_norm: whether queries and keys are normed, head by head, before they are rotated.
      qkv_bias, o_bias, mlp_bias, unembed_bias: whether those projections have biases.
      learned_positions: whether a learned vector is added to the embedding of every position.
      rope: rotary embedding; None: none.
      local_rope: that of local layers; None: the same.
      local: for each layer, whether it is local: whether its queries attend to the last ``window`` tokens only, their
        own included. Empty: no layer is.
      window: see ``local``.
      score_scale: factor on the products of queries and keys.
      scale_by_layer: whether that factor is divided by the layer's number, counted from 1.
      score_cap: attention scores s become ``cap * tanh(s / cap)``; None: they stay.
      logit_cap: the same for the logits.
      embed_scale: factor on the embedding where the stream begins, not where it ends.
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
    tied: bool
    norm: str
    norm_eps: float
    activation: str
    gated: bool
    score_scale: float
    parallel: bool = False
    shared_norm: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    learned_positions: bool = False
    rope: Rope | None = None
    local_rope: Rope | None = None
    local: tuple[bool, ...] = ()
    window: int | None = None
    scale_by_layer: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float = 1.0

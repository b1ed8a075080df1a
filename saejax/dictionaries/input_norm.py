"""Per-token normalisation of a dictionary's input, undone on its output.

    f = act(n(x) W_enc + b_enc)        y = (f W_dec + b_dec) scale(x) + shift(x)

``layer_norm``    n(x) = (x - mean) / (std + 1e-5), scale = std, shift = mean: SAELens' ``layer_norm`` and OpenAI's v5
                  dictionaries. The standard deviation has D - 1 in its denominator, as torch's ``std`` has.
``token_norm``    n(x) = x sqrt(D) / |x|, scale = |x| / sqrt(D), shift = 0: SAELens' ``constant_norm_rescale``.
``center``        n(x) = x - mean, scale = 1, shift = mean: for models whose writing weights were centred
                  (TransformerLens' ``center_writing_weights``). There every vector that is added to the stream
                  has mean 0 over D, so the stream is x - mean of the model as published.

Mean, standard deviation and norm are over D. Statistics are computed in float32 or wider.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NORMS = ("", "layer_norm", "token_norm", "center")
_EPSILON = 1e-5  # SAELens adds it to the standard deviation going in, and leaves it out coming back


class Normalised(NamedTuple):
    """A batch of tokens after normalisation."""

    x_xD: jax.Array  #: n(x)
    scale_x1: jax.Array  #: what outputs are multiplied with; 1 where the norm leaves scales alone
    shift_x1: jax.Array  #: what is then added to them


def normalise(x_xD: jax.Array, norm: str) -> Normalised:
    """Normalise each token.

    Args:
      x_xD: values of the site, any leading dimensions.
      norm: one of ``NORMS`` but "".
    """
    x_xD = x_xD.astype(jnp.promote_types(x_xD.dtype, jnp.float32))
    if norm == "token_norm":
        scale_x1 = jnp.linalg.norm(x_xD, axis=-1, keepdims=True) / jnp.sqrt(jnp.asarray(x_xD.shape[-1], x_xD.dtype))
        # A token of norm 0 has no direction: it stays 0, and so does its output.
        return Normalised(x_xD / jnp.where(scale_x1 > 0, scale_x1, 1.0), scale_x1, jnp.zeros_like(scale_x1))
    mean_x1 = jnp.mean(x_xD, axis=-1, keepdims=True)
    centred_xD = x_xD - mean_x1
    if norm == "center":
        return Normalised(centred_xD, jnp.ones_like(mean_x1), mean_x1)
    std_x1 = jnp.std(centred_xD, axis=-1, keepdims=True, ddof=1)
    return Normalised(centred_xD / (std_x1 + _EPSILON), std_x1, mean_x1)

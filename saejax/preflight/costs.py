"""Floating-point operations, counted by hand: XLA's own count takes the body of a loop over layers once.

A product of [m, k] and [k, n] is 2 m k n operations; norms, softmax and other elementwise work are left out.
"""

from math import prod

from saejax.models.config import DecoderConfig
from saejax.models.parameters import LAYERS, parameter_table


def pass_flops(model: DecoderConfig, tokens: int, length: int, layers: int) -> float:
    """A forward pass through some layers.

    Args:
      model: the decoder.
      tokens: in all, padding included.
      length: of each prompt; scores of later tokens are computed and masked, as the decoder does it.
      layers: how many.
    """
    weights = sum(
        prod(shape[1:])
        for name, (shape, _) in parameter_table(model).items()
        if name.startswith(LAYERS) and len(shape) > 2 and "_bias_" not in name
    )
    return tokens * layers * (2.0 * weights + 4.0 * length * model.n_heads * model.d_head)


def head_flops(model: DecoderConfig, positions: int) -> float:
    """Logits of the whole vocabulary at so many positions."""
    return 2.0 * positions * model.d_model * model.vocab


def step_flops(tokens: int, d_in: int, features: int) -> float:
    """A training step: encoder and decoder, each once forwards and twice backwards."""
    return 12.0 * tokens * d_in * features

"""Floating-point operations of passes and training steps: the one table of formulas.

Preflight, timing lines and benchmarks use it, because XLA's own count takes the body of a loop over layers once. A
product of [m, k] and [k, n] is 2 m k n operations; norms, softmax and other elementwise work are left out.
"""

from math import prod

from saejax.dictionaries.cross_layer import FORM
from saejax.models.config import DecoderConfig
from saejax.models.parameters import LAYERS, parameter_table


def pass_flops(model: DecoderConfig, tokens: int, length: int, layers: float) -> float:
    """Return the operations of a forward pass through some layers.

    Args:
      model: the decoder.
      tokens: number of tokens in all, padding included.
      length: tokens of each prompt; scores of later tokens are computed and masked, as the decoder does it.
      layers: number of layers.
    """
    weights = sum(
        prod(shape[1:])
        for name, (shape, _) in parameter_table(model).items()
        if name.startswith(LAYERS) and len(shape) > 2 and "_bias_" not in name
    )
    return tokens * layers * (2.0 * weights + 4.0 * length * model.n_heads * model.d_head)


def head_flops(model: DecoderConfig, positions: int) -> float:
    """Return the operations of the logits of the whole vocabulary at some positions."""
    return 2.0 * positions * model.d_model * model.vocab


def step_flops(tokens: int, d_in: int, features: int, active: int | None = None) -> float:
    """Return the operations of a training step: encoder and decoder, each once forwards and twice backwards.

    With products of the ``active`` features of a token only, the encoder's forward product alone is of all
    ``features``; None: dense products. ``tokens`` counts the batch, ``d_in`` is the dictionary's width.
    """
    return 12.0 * tokens * d_in * features if active is None else tokens * d_in * (2.0 * features + 10.0 * active)


def weights_share(form: str, layers: int) -> float:
    """Return the weights of what is trained on some layers, as a share of those of as many dictionaries.

    Of each layer's two matrices a cross-layer transcoder (a ``form`` of ``--train.form``) has one encoder, and
    (layers + 1) / 2 decoders on average.
    """
    return (layers + 3) / 4 if form == FORM else 1.0


def parameters(model: DecoderConfig) -> int:
    """Return the number of parameters of the decoder."""
    return sum(prod(shape) for shape, _ in parameter_table(model).values())

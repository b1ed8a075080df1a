"""Floating-point operations of passes and training steps, and peak rates of accelerators: the one table of each.

Preflight, timing lines and benchmarks use it, because XLA's own count takes the body of a loop over layers once. A
product of [m, k] and [k, n] is 2 m k n operations; norms, softmax and other elementwise work are left out. Peaks are
matrix products' by the vendors' data sheets (dense, without sparsity).
"""

import re
from math import prod

import jax

from saejax.dictionaries.cross_layer import FORMS
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
        # A token goes through the experts that its router chooses, not through all.
        prod(shape[1:]) * (model.experts_per_token / model.n_experts if "_Ex" in name else 1)
        for name, (shape, _) in parameter_table(model).items()
        if name.startswith(LAYERS) and len(shape) > 2 and "_bias_" not in name
    )
    return tokens * layers * (2.0 * weights + 4.0 * length * model.n_heads * model.d_head)


def head_flops(model: DecoderConfig, positions: int) -> float:
    """Return the operations of the logits of the whole vocabulary at some positions."""
    return 2.0 * positions * model.d_model * model.vocab


def step_flops(tokens: int, d_in: int, features: int, active: int | None = None, d_out: int = 0) -> float:
    """Return the operations of a training step: encoder and decoder, each once forwards and twice backwards.

    With products of the ``active`` features of a token only, the encoder's forward product alone is of all
    ``features``; None: dense products. ``tokens`` counts the batch, ``d_in`` is the width that is read and ``d_out``
    the width that is written; 0: the same.
    """
    d_out = d_out or d_in
    if active is None:
        return 6.0 * tokens * (d_in + d_out) * features
    return tokens * (d_in * (2.0 * features + 4.0 * active) + d_out * 6.0 * active)


def weights_share(form: str, layers: int) -> float:
    """Return the number of weights trained on some layers, as a share of the weights of one dictionary a layer.

    Of each layer's two matrices a cross-layer transcoder (a ``form`` of ``--train.form``) has one encoder, and
    (layers + 1) / 2 decoders on average.
    """
    return (layers + 3) / 4 if form in FORMS else 1.0


def parameters(model: DecoderConfig) -> int:
    """Return the number of parameters of the decoder."""
    return sum(prod(shape) for shape, _ in parameter_table(model).values())


# Words of ``device_kind`` -> TFLOP/s with bfloat16 operands, and with float32 operands in full precision where the
# hardware has such products (TPUs emulate them).
_PEAKS: dict[str, tuple[float, float | None]] = {
    "V100": (125.0, 15.7),  # float16
    "A100": (312.0, 19.5),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "H200 NVL": (835.0, 60.0),
    "H200": (989.0, 67.0),
    "B200": (2250.0, 75.0),
    "TPU v3": (123.0, None),
    "TPU v4": (275.0, None),
    "TPU v5 lite": (197.0, None),
    "TPU v5p": (459.0, None),
    "TPU v5": (459.0, None),
    "TPU v6 lite": (918.0, None),
}


def peak_flops(device: jax.Device | str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device for products with operands of a dtype; None where it is not known.

    Args:
      device: a device, or the name of its kind, such as "a100-80".
      dtype: "float32" or "bfloat16".
    """
    kind = device if isinstance(device, str) else device.device_kind
    # Whole words: an "A10G" is no A10, and an "RTX A1000" no A100.
    matches = [name for name in _PEAKS if re.search(rf"\b{name}\b", kind, re.IGNORECASE)]
    if not matches:
        return None
    bfloat16, float32 = _PEAKS[max(matches, key=len)]
    rate = bfloat16 if dtype == "bfloat16" else float32
    return None if rate is None else rate * 1e12

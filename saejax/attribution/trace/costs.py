"""The arithmetic of a graph, in floating-point operations; a product of [m, k] and [k, n] has 2 m k n."""

import numpy as np

from saejax.models.config import DecoderConfig


def row_flops(model: DecoderConfig, layers_T: np.ndarray | float, positions_T: np.ndarray | float) -> float:
    """What rows of a graph need at the least: the transposed projections of values and outputs of attention.

    Args:
      layers_T: how many layers each target goes down through.
      positions_T: the positions up to its own.
    """
    per_token = 2.0 * model.d_model * model.d_head * (model.n_heads + model.n_kv_heads)
    return float(np.sum(np.asarray(layers_T, np.float64) * positions_T)) * per_token

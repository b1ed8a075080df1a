"""Nearest neighbours among the directions of a dictionary: two that coincide are one feature counted twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.evaluation.results import NeighbourCosines

_BLOCK_VALUES = 2**25  # cosines at once: 128 MiB in fp32
_MOST_VALUES = 2**34  # in all: cosines of 131,072 features with one another
NEAR = 0.9  # a feature with a neighbour above this cosine has nearly a copy


def neighbour_cosines(W_dec_FxD: jax.Array) -> np.ndarray:
    """Return the largest cosine of each row with another row, [F]; a row of zeros has cosine 0 with every other.

    Rows are compared in blocks, so that memory stays bounded whatever the number of features. Beyond 131,072 features
    a sample of blocks, spread from the first to the last, is compared; the result then has its length, [N].
    """
    features = W_dec_FxD.shape[0]
    if features < 2:
        return np.zeros(0, np.float32)
    block = max(1, min(_BLOCK_VALUES // features, features))
    starts = np.minimum(np.arange(0, features, block), features - block)  # the last block reaches back
    blocks = max(1, _MOST_VALUES // (block * features))
    starts_N = starts[np.linspace(0, len(starts) - 1, min(blocks, len(starts))).astype(int)]
    largest_NxB = np.asarray(_largest(block, W_dec_FxD, starts_N))
    cosine_F, looked_at_F = np.empty(features, np.float32), np.zeros(features, bool)
    for start, largest_B in zip(starts_N.tolist(), largest_NxB, strict=True):
        cosine_F[start : start + block], looked_at_F[start : start + block] = largest_B, True
    return cosine_F[looked_at_F]


def summary(cosine_F: np.ndarray, features: int) -> NeighbourCosines | None:
    """Return the distribution of the neighbours' cosines; None for a dictionary of one feature.

    Args:
      cosine_F: the result of ``neighbour_cosines``.
      features: number of features of the dictionary.
    """
    if not len(cosine_F):
        return None
    median, p90, p99 = np.quantile(cosine_F.astype(np.float64), [0.5, 0.9, 0.99]).tolist()
    mean, largest = float(cosine_F.mean(dtype=np.float64)), float(cosine_F.max())
    near, looked_at = float(np.mean(cosine_F > NEAR)), len(cosine_F) if len(cosine_F) < features else None
    return NeighbourCosines(mean, median, p90, p99, largest, near, looked_at)


@functools.partial(jax.jit, static_argnums=0)
def _largest(block: int, W_dec_FxD: jax.Array, starts_N: jax.Array) -> jax.Array:
    """Return the rows' largest cosines with others, [N, block]; block n begins at row starts_N[n]."""
    return lax.map(lambda start: cosines_of_block(block, W_dec_FxD, start).max(axis=-1), starts_N)


def cosines_of_block(block: int, W_dec_FxD: jax.Array, start: jax.Array) -> jax.Array:
    """Return cosines of ``block`` rows of W_dec from ``start`` with all, [R, F]: -inf with itself, 0 with zero rows."""
    # A row of zeros has no direction: its cosines are 0, not NaN.
    length_Fx1 = jnp.linalg.norm(W_dec_FxD, axis=-1, keepdims=True)
    unit_FxD = W_dec_FxD / jnp.where(length_Fx1 > 0, length_Fx1, 1.0)
    # By their numbers: of a slice with an unknown start every device would make all rows, where features are split.
    rows_RxD = jnp.take(unit_FxD, start + jnp.arange(block), axis=0, mode="clip")
    # Full fp32 on every device: rounded to TF32, cosines near the threshold would count differently.
    cosine_RxF = jnp.matmul(rows_RxD, unit_FxD.T, precision="highest")
    # By its index, not by a cosine of 1, so that an exact copy counts as a neighbour.
    itself_RxF = jnp.arange(len(unit_FxD))[None] == (start + jnp.arange(block))[:, None]
    return jnp.where(itself_RxF, -jnp.inf, cosine_RxF)

"""Vectors in 8 bits a number: E4M3 floats (4 bits of exponent, 3 of mantissa), each vector with a scale of its own.

The scale is the vector's root mean square, which its norm tells; so numbers lie below sqrt(d), far from the format's
largest, 448, and a long vector (a sink) costs its neighbours nothing. A number of at least 1/64 of the root mean square
is rounded by at most a 16th of itself, a smaller one by at most 1/1024 of the root mean square.
"""

import ml_dtypes
import numpy as np

_FLOAT8 = ml_dtypes.float8_e4m3fn
# Of all codes: looked up in less than a fifth of a cast's time.
_VALUES = np.arange(256, dtype=np.uint8).view(_FLOAT8).astype(np.float32)


def encoded(values_NxD: np.ndarray, norms_N: np.ndarray) -> np.ndarray:
    """Finite vectors as uint8 [N, D].

    Args:
      values_NxD: the vectors.
      norms_N: their Euclidean norms, float32.
    """
    return (values_NxD / _scale_Nx1(norms_N, values_NxD.shape[1])).astype(_FLOAT8).view(np.uint8)


def decoded(codes_NxD: np.ndarray, norms_N: np.ndarray) -> np.ndarray:
    """Vectors in bfloat16.

    Args:
      codes_NxD: as ``encoded`` gave them.
      norms_N: as it took them.
    """
    values_NxD = _VALUES.take(codes_NxD)
    values_NxD *= _scale_Nx1(norms_N, codes_NxD.shape[1])
    return values_NxD.astype(ml_dtypes.bfloat16)


def _scale_Nx1(norms_N: np.ndarray, width: int) -> np.ndarray:
    scale_Nx1 = norms_N[:, None] / np.float32(width**0.5)
    return np.where(scale_Nx1 > 0, scale_Nx1, np.float32(1))

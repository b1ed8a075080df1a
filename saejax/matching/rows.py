"""Rows by which the features of dictionaries are matched, and rows that share nothing with them."""

from collections.abc import Sequence

import numpy as np

from saejax.dictionaries import Dictionary, rescale


def unit(rows_NxD: np.ndarray) -> np.ndarray:
    """Return rows divided by their length, fp32; rows of length 0 stay 0."""
    rows_NxD = np.asarray(rows_NxD, np.float32)
    length_Nx1 = np.linalg.norm(rows_NxD, axis=1, keepdims=True)
    return np.divide(rows_NxD, length_Nx1, out=np.zeros_like(rows_NxD), where=length_Nx1 > 0)


def weight_rows(measure: str, dictionary: Dictionary) -> np.ndarray:
    """Return the unit rows of a dictionary's features, fp32 [F, D]; their products are cosines."""
    return unit(np.asarray(dictionary.W_enc_DxF[...].T if measure == "encoder" else dictionary.W_dec_FxD[...]))


def independent_rows(rows_FxD: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Return random directions with the mean and covariance of some rows, each as long as its row.

    They are the null of a comparison of directions. Directions of a residual stream lie in few dimensions, so uniform
    directions would be too far from everything, and any two dictionaries would seem to share features. Rows of zeros,
    of features that are not compared, stay so, and do not count.
    """
    kept_NxD = rows_FxD[rows_FxD.any(axis=1)]
    if not len(kept_NxD):
        return np.zeros_like(rows_FxD)
    mean_D = kept_NxD.mean(axis=0)
    # float64, because small eigenvalues of a covariance in float32 are rounding errors.
    centred_NxD = (kept_NxD - mean_D[None]).astype(np.float64)
    rng = np.random.default_rng(seed)
    # An eigendecomposition, as a covariance of few rows is singular and has no Cholesky factor.
    value_D, vector_DxD = np.linalg.eigh(centred_NxD.T @ centred_NxD / len(centred_NxD))
    root_DxD = (vector_DxD * np.sqrt(np.maximum(value_D, 0))[None]).astype(np.float32)
    random_FxD = rng.standard_normal(rows_FxD.shape, np.float32) @ root_DxD.T + mean_D[None]
    return unit(random_FxD) * np.linalg.norm(rows_FxD, axis=1, keepdims=True)


def random_rotation(width: int, seed: Sequence[int]) -> np.ndarray:
    """Return a rotation drawn uniformly, fp32 [width, width]."""
    q_DxD, r_DxD = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return (q_DxD * np.sign(np.diag(r_DxD))[None]).astype(np.float32)  # the signs make the distribution uniform


def rotate(dictionary: Dictionary, seed: Sequence[int]) -> Dictionary:
    """Return a dictionary whose features are rotated together about the decoder's bias, by a random rotation.

    It explains the rotated activations as well, and is as sparse, as the dictionary itself; what it explains of the
    unrotated ones is chance.
    """
    # Centred first: a rotation about the origin would move the activations' mean away from the bias.
    centred = rescale.centre(dictionary)
    turn_DxD, arrays = random_rotation(dictionary.config.d_in, seed), centred.arrays
    rotated = dict(W_enc_DxF=turn_DxD @ arrays["W_enc_DxF"], W_dec_FxD=arrays["W_dec_FxD"] @ turn_DxD.T)
    return Dictionary(centred.config, centred.matmul_dtype, **arrays | rotated)

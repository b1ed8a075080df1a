"""What dictionaries minimise: means over the tokens of a batch, each a scalar."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries.joined import row_lengths
from saejax.dictionaries.matmul import matmul


def squared_error(
    y_BxD: jax.Array, y_hat_BxD: jax.Array, metric_DxD: jax.Array | None = None, matmul_dtype: str = "float32"
) -> jax.Array:
    """Sum over the width of the squared error, mean over tokens (the convention of SAELens).

    Args:
      metric_DxD: what errors are multiplied with first, such as ``whitening``.
      matmul_dtype: dtype of the operands of that product.
    """
    return squared_size(y_BxD - y_hat_BxD, metric_DxD, matmul_dtype)


def squared_size(error_BxD: jax.Array, metric_DxD: jax.Array | None = None, matmul_dtype: str = "float32") -> jax.Array:
    """``squared_error`` of ``error_BxD``; ``metric_DxD`` and ``matmul_dtype`` are as there."""
    if metric_DxD is not None:
        error_BxD = matmul(error_BxD, metric_DxD, matmul_dtype)
    return jnp.mean(jnp.sum(jnp.square(error_BxD), axis=-1))


def whitening(acts_NxD: np.ndarray, power: float) -> np.ndarray:
    """The matrix C^(-power/2) of the covariance C of activations ``acts``, [D, D] fp64, times a factor.

    The squared error of ``error @ whitening`` weighs directions of small variance up: of C's eigenvalues v it makes
    v^(1 - power), the same for all at power 1. The factor keeps the total variance as it was. Eigenvalues
    below a thousandth of their mean count as that.
    """
    covariance_DxD = np.atleast_2d(np.cov(acts_NxD.T))
    values_D, vectors_DxD = np.linalg.eigh(covariance_DxD)
    floored_D = np.maximum(values_D, 1e-3 * values_D.mean())
    matrix_DxD = (vectors_DxD * floored_D ** (-power / 2)) @ vectors_DxD.T
    return matrix_DxD * np.sqrt(np.trace(covariance_DxD) / np.trace(matrix_DxD @ covariance_DxD @ matrix_DxD))


def l1_norm_weighted(f_BxF: jax.Array, W_dec_FxD: jax.Array, widths: Sequence[int] = ()) -> jax.Array:
    """Mean over tokens of sum_i |f_i| |W_dec_i|, so that shrinking f and growing the decoder gains nothing.

    Args:
      widths: of the parts of a joined site, over which |W_dec_i| is the sum of the parts' lengths; (): one site.
    """
    return jnp.sum(jnp.mean(jnp.abs(f_BxF), axis=0) * row_lengths(W_dec_FxD, widths))


def tanh_norm_weighted(
    f_BxF: jax.Array, W_dec_FxD: jax.Array, slope: float = 4.0, widths: Sequence[int] = ()
) -> jax.Array:
    """Mean over tokens of sum_i tanh(slope f_i |W_dec_i|), a smooth stand-in for L0 (Conerly et al., 2025)."""
    return jnp.mean(jnp.sum(jnp.tanh(slope * f_BxF * row_lengths(W_dec_FxD, widths)[None]), axis=-1))


def decorrelation(f_BxF: jax.Array, tokens: int = 512) -> jax.Array:
    """Mean over pairs i != j of the squared covariance of the activations f_i and f_j.

    Taken over at most ``tokens`` tokens, evenly spaced in the batch, and through the Gram matrix: with Z the centred
    activations of n tokens, |Z' Z|^2 = |Z Z'|^2, which costs n^2 F instead of n F^2.
    """
    n_tokens, features = f_BxF.shape
    f_NxF = f_BxF if n_tokens <= tokens else f_BxF[np.arange(tokens) * n_tokens // tokens]
    centred_NxF = f_NxF - jnp.mean(f_NxF, axis=0, keepdims=True)
    degrees = max(f_NxF.shape[0] - 1, 1)
    all_pairs = jnp.sum(jnp.square(matmul(centred_NxF, centred_NxF.T))) / degrees**2
    variance_F = jnp.sum(jnp.square(centred_NxF), axis=0) / degrees
    return (all_pairs - jnp.sum(jnp.square(variance_F))) / float(max(features * (features - 1), 1))


def alignment(W_enc_DxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """Sum over the features of 1 - cos(encoder column, decoder row); one of length 0 has the cosine 0.

    Of features that overlap, decoder rows take on some of what fires with them and encoder columns what tells them
    apart: a feature's own direction lies between.

    Args:
      W_enc_DxF, W_dec_FxD: of an SAE, whose encoder and decoder are of one space.
    """
    encoder_FxD = W_enc_DxF.T
    dots_F = jnp.sum(encoder_FxD * W_dec_FxD, axis=-1)
    squares_F = jnp.sum(jnp.square(encoder_FxD), axis=-1) * jnp.sum(jnp.square(W_dec_FxD), axis=-1)
    return jnp.sum(1 - dots_F * lax.rsqrt(jnp.maximum(squares_F, 1e-24)))  # a root has no gradient at 0


def dead_pre_activation(
    pre_BxF: jax.Array,
    threshold_F: jax.Array,
    dead_F: jax.Array,
    W_dec_FxD: jax.Array,
    widths: Sequence[int] = (),
) -> jax.Array:
    """Mean over tokens of sum over dead features of max(threshold - pre, 0) |W_dec|: pulls dead ones back to firing."""
    short_BxF = jax.nn.relu(threshold_F[None] - pre_BxF) * row_lengths(W_dec_FxD, widths)[None]
    return jnp.mean(jnp.sum(jnp.where(dead_F[None], short_BxF, jnp.zeros_like(short_BxF)), axis=-1))


def explained_variance(y_BxD: jax.Array, error_BxD: jax.Array) -> jax.Array:
    """1 - sum |error|^2 / sum |y - mean of the batch|^2; 0 where all rows are the same."""
    deviations_BxD = y_BxD - jnp.mean(y_BxD, axis=0, keepdims=True)
    error, total = jnp.sum(jnp.square(error_BxD)), jnp.sum(jnp.square(deviations_BxD))
    return jnp.where(total > 0, 1 - error / jnp.where(total > 0, total, 1.0), 0.0)

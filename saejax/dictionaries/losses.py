"""What dictionaries minimise: means over the tokens of a batch, each a scalar."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries import sparsity
from saejax.dictionaries.joined import row_lengths
from saejax.dictionaries.matmul import matmul


def squared_error(
    y_BxD: jax.Array, y_hat_BxD: jax.Array, metric_DxD: jax.Array | None = None, operands: str = "float32"
) -> jax.Array:
    """Sum over the width of the squared error, mean over tokens (the convention of SAELens).

    Args:
      metric_DxD: what errors are multiplied with first, such as ``whitening``.
      operands: dtype of the operands of that product.
    """
    return squared_size(y_BxD - y_hat_BxD, metric_DxD, operands)


def squared_size(error_BxD: jax.Array, metric_DxD: jax.Array | None = None, operands: str = "float32") -> jax.Array:
    """``squared_error`` of ``error_BxD``; ``metric_DxD`` and ``operands`` are as there."""
    if metric_DxD is not None:
        error_BxD = matmul(error_BxD, metric_DxD, operands)
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


def auxk(
    pre_BxF: jax.Array,
    dead_F: jax.Array,
    W_dec_FxD: jax.Array,
    error_BxD: jax.Array,
    k: int,
    operands: str = "float32",
    metric_DxD: jax.Array | None = None,
    any_dead: jax.Array | bool = True,
) -> jax.Array:
    """How badly the k strongest dead features explain what the living leave over (after Gao et al., 2024).

    The error is a constant here, so that of the features this moves the dead and no others:

        min(dead / k, 1) * mean over tokens of |error - sum_i f_i W_dec_i|^2,   f = top-k of the dead pre-activations

    Args:
      pre_BxF: pre-activations.
      dead_F: True for dead features. Where none is dead the result is 0 and nothing is computed.
      error_BxD: y - y_hat.
      k: how many dead features act on each token, at least 1.
      operands: dtype of the operands of the product.
      metric_DxD: as for ``squared_error``.
      any_dead: False if no member of a stack has a dead feature: where members are vectorised, this alone decides
        whether anything is computed.
    """
    constants = dead_F, lax.stop_gradient(error_BxD), metric_DxD, jnp.asarray(any_dead)
    return _auxk(pre_BxF, W_dec_FxD, constants, k, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _auxk(pre_BxF, W_dec_FxD, constants, k, operands):
    return _auxk_and_gradients(pre_BxF, W_dec_FxD, constants, k, operands)[0]


def _auxk_and_gradients(pre_BxF, W_dec_FxD, constants, k, operands):
    """Both in one branch: automatic differentiation would hand everything it keeps from one branch to another."""
    dead_F, error_BxD, metric_DxD, any_dead = constants
    dead = jnp.sum(dead_F)

    def explain(pre_BxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
        f_BxF = sparsity.topk(jnp.where(dead_F[None], pre_BxF, jnp.zeros_like(pre_BxF)), k)
        share = jnp.minimum(dead.astype(pre_BxF.dtype) / k, 1.0)
        return share * squared_error(error_BxD, matmul(f_BxF, W_dec_FxD, operands), metric_DxD, operands)

    def nothing(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return jnp.zeros((), pre_BxF.dtype), tuple(map(jnp.zeros_like, arrays))

    def own(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return lax.cond(dead > 0, jax.value_and_grad(explain, argnums=(0, 1)), nothing, *arrays)

    return lax.cond(any_dead, own, nothing, pre_BxF, W_dec_FxD)


_auxk.defvjp(
    _auxk_and_gradients,
    lambda k, operands, gradients, cotangent: (*(cotangent * gradient for gradient in gradients), None),
)


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

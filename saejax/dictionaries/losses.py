"""Losses that dictionaries minimise: means over the tokens of a batch, each a scalar."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries import sparsity
from saejax.dictionaries.matmul import matmul
from saejax.reductions import over_last

Gradients = tuple[jax.Array, jax.Array]
_DEAD_SHARE, _LANES = 8, 128  # AuxK gathers at most an eighth of the features, in whole lanes of a vector unit
_LEAST_VARIANCE = 1e-10  # of the targets' squares: float32 has two digits of smaller deviations, or rounding alone


def squared_error(
    y_BxD: jax.Array, y_hat_BxD: jax.Array, metric_DxD: jax.Array | None = None, matmul_dtype: str = "float32"
) -> jax.Array:
    """Return the squared error, summed over the width and averaged over tokens (the convention of SAELens).

    Args:
      y_BxD: targets.
      y_hat_BxD: reconstructions.
      metric_DxD: matrix that errors are multiplied with first, such as ``whitening``.
      matmul_dtype: dtype of the product's operands.
    """
    return squared_size(y_BxD - y_hat_BxD, metric_DxD, matmul_dtype)


def squared_size(error_BxD: jax.Array, metric_DxD: jax.Array | None = None, matmul_dtype: str = "float32") -> jax.Array:
    """Return ``squared_error`` of errors ``error_BxD``; ``metric_DxD`` and ``matmul_dtype`` are as there."""
    if metric_DxD is not None:
        error_BxD = matmul(error_BxD, metric_DxD, matmul_dtype)
    return jnp.mean(over_last(jnp.sum, jnp.square(error_BxD)))


def whitening(acts_NxD: np.ndarray, power: float) -> np.ndarray:
    """Return C^(-power/2) of the covariance C of activations ``acts``, [D, D] fp64, times a factor.

    The squared error of ``error @ whitening`` weighs directions of small variance up: of C's eigenvalues v it makes
    v^(1 - power), the same for all at power 1. The factor keeps the total variance as it was. Eigenvalues
    below a thousandth of their mean count as that.
    """
    covariance_DxD = np.atleast_2d(np.cov(acts_NxD.T))
    values_D, vectors_DxD = np.linalg.eigh(covariance_DxD)
    floored_D = np.maximum(values_D, 1e-3 * values_D.mean())
    matrix_DxD = (vectors_DxD * floored_D ** (-power / 2)) @ vectors_DxD.T
    return matrix_DxD * np.sqrt(np.trace(covariance_DxD) / np.trace(matrix_DxD @ covariance_DxD @ matrix_DxD))


def l1_norm_weighted(f_BxF: jax.Array, norms_F: jax.Array) -> jax.Array:
    """Return the mean over tokens of sum_i |f_i| |W_dec_i|: shrinking f and growing the decoder gains nothing.

    ``norms`` are |W_dec_i|, ``Dictionary.decoder_norms_F``.
    """
    # The mean comes first: then norms are multiplied with F numbers, not with B F.
    return jnp.sum(jnp.mean(jnp.abs(f_BxF), axis=0) * norms_F)


def decorrelation(f_BxF: jax.Array, tokens: int = 512) -> jax.Array:
    """Return the mean over pairs i != j of the squared covariance of the activations f_i and f_j.

    Taken over at most ``tokens`` tokens, evenly spaced in the batch, and through the Gram matrix: with Z the centred
    activations of n tokens, |Z' Z|^2 = |Z Z'|^2, which costs n^2 F instead of n F^2.
    """
    n_tokens, features = f_BxF.shape
    f_NxF = f_BxF if n_tokens <= tokens else f_BxF[np.arange(tokens) * n_tokens // tokens]
    centred_NxF = f_NxF - jnp.mean(f_NxF, axis=0, keepdims=True)
    degrees = max(f_NxF.shape[0] - 1, 1)
    # Pairs i = j are taken out again: they are variances.
    all_pairs = jnp.sum(jnp.square(matmul(centred_NxF, centred_NxF.T))) / degrees**2
    variance_F = jnp.sum(jnp.square(centred_NxF), axis=0) / degrees
    return (all_pairs - jnp.sum(jnp.square(variance_F))) / float(max(features * (features - 1), 1))


def explained_variance(y_BxD: jax.Array, error_BxD: jax.Array) -> jax.Array:
    """Return 1 - sum |error|^2 / sum |y - mean of the batch|^2; 0 where all rows are the same but for rounding."""
    deviations_BxD = y_BxD - jnp.mean(y_BxD, axis=0, keepdims=True)
    # Once more: the mean of many equal numbers is not that number to the last bit.
    deviations_BxD = deviations_BxD - jnp.mean(deviations_BxD, axis=0, keepdims=True)
    terms = error_BxD, deviations_BxD, y_BxD
    return explained_share(*(over_last(jnp.sum, jnp.square(term_BxD)).sum() for term_BxD in terms))


def explained_share(error: Any, variance: Any, square: Any, constant: float = 0.0) -> Any:
    """Return 1 - error / variance, and ``constant`` where targets are the same but for rounding.

    Args:
      error: sum |y - y_hat|^2, a number or an array of NumPy or JAX.
      variance: sum |y - mean|^2.
      square: sum |y|^2, with which the variance is compared.
      constant: result of targets that do not vary.
    """
    xp: Any = jnp if isinstance(variance, jax.Array) else np
    varies = variance > _LEAST_VARIANCE * square
    return xp.where(varies, 1 - error / xp.where(varies, variance, 1.0), constant)


class AuxKForm(NamedTuple):
    """Static settings of the AuxK loss."""

    k: int  #: number of dead features that act on each token, at least 1
    matmul_dtype: str = "float32"  #: dtype of the operands of the products
    all_columns: bool = False  #: compute with all columns however few are dead, and gather none


def auxk(
    pre_BxF: jax.Array,
    dead_F: jax.Array,
    W_dec_FxD: jax.Array,
    error_BxD: jax.Array,
    form: AuxKForm,
    metric_DxD: jax.Array | None = None,
    most_dead: jax.Array | int | None = None,
) -> jax.Array:
    """Return the AuxK loss: dead features reconstruct the residual of the living ones (after Gao et al., 2024).

    The residual is a constant here, so that only dead features get a gradient:

        min(dead / k, 1) * mean over tokens of |error - sum_i f_i W_dec_i|^2,   f = top-k of the dead pre-activations

    Usually few features are dead. Then only their columns, C of them, are computed, at an eighth of the cost of a
    product with all features.

    Args:
      pre_BxF: pre-activations.
      dead_F: True for dead features. Where none is dead the result is 0 and nothing is computed.
      W_dec_FxD: decoder.
      error_BxD: residual, y - y_hat.
      form: how to compute it.
      metric_DxD: as for ``squared_error``.
      most_dead: the largest number of dead features among the members that are computed at the same time, which chooses
        the branch: under vmap a member's own number cannot. None: the number in ``dead_F``.
    """
    dead_count = jnp.sum(dead_F) if most_dead is None else jnp.asarray(most_dead)
    # Constants: the living features leave the residual, which AuxK should not move.
    constants = dead_F, lax.stop_gradient(error_BxD), metric_DxD, dead_count
    return _auxk(pre_BxF, W_dec_FxD, constants, form)


def dead_columns(features: int, k: int) -> int:
    """Return how many dead features' columns are gathered at most, k acting on each token; 0 where it saves nothing."""
    room = -(-max(features // _DEAD_SHARE, k) // _LANES) * _LANES
    return room if 2 * room <= features else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _auxk(pre_BxF, W_dec_FxD, constants, form):
    """Return the AuxK loss, whose gradients are computed with it; see ``auxk``."""
    return _auxk_and_gradients(pre_BxF, W_dec_FxD, constants, form)[0]


def _auxk_and_gradients(pre_BxF, W_dec_FxD, constants, form):
    """Compute both in one branch: autodiff would carry all residuals of every branch from one switch to another."""
    dead_F, error_BxD, metric_DxD, dead_count = constants
    k, matmul_dtype, all_columns = form

    def explain(pre_BxC: jax.Array, W_dec_CxD: jax.Array) -> jax.Array:
        """Return the loss of some columns, of which all but dead ones are 0."""
        f_BxC = sparsity.topk(pre_BxC, k)
        share = jnp.minimum(jnp.sum(dead_F).astype(pre_BxC.dtype) / k, 1.0)
        return share * squared_error(error_BxD, matmul(f_BxC, W_dec_CxD, matmul_dtype), metric_DxD, matmul_dtype)

    explained = jax.value_and_grad(explain, argnums=(0, 1))

    def nothing(pre_BxF: jax.Array, W_dec_FxD: jax.Array) -> tuple[jax.Array, Gradients]:
        return jnp.zeros((), pre_BxF.dtype), (jnp.zeros_like(pre_BxF), jnp.zeros_like(W_dec_FxD))

    def with_all(pre_BxF: jax.Array, W_dec_FxD: jax.Array) -> tuple[jax.Array, Gradients]:
        value, (to_pre_BxF, to_W_FxD) = explained(jnp.where(dead_F[None], pre_BxF, jnp.zeros_like(pre_BxF)), W_dec_FxD)
        return value, (jnp.where(dead_F[None], to_pre_BxF, jnp.zeros_like(to_pre_BxF)), to_W_FxD)

    few = 0 if all_columns else dead_columns(len(dead_F), k)
    branches: list[Callable] = [nothing, with_all]
    branch = jnp.int32(dead_count > 0)
    if few:
        branches.insert(1, functools.partial(_few_columns, explained, dead_F, few))
        branch += jnp.int32(dead_count > few)
    return lax.switch(branch, branches, pre_BxF, W_dec_FxD)


def _few_columns(
    explained: Callable[[jax.Array, jax.Array], tuple[jax.Array, Gradients]],
    dead_F: jax.Array,
    room: int,
    pre_BxF: jax.Array,
    W_dec_FxD: jax.Array,
) -> tuple[jax.Array, Gradients]:
    """Evaluate ``explained`` on the dead features' columns alone, at most ``room`` of them."""
    features = len(dead_F)
    (at_C,) = jnp.nonzero(dead_F, size=room, fill_value=features)
    at_C = jnp.where(at_C < features, at_C, features + jnp.arange(room))  # distinct indices out of range
    pre_BxC = pre_BxF.at[:, at_C].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
    W_dec_CxD = W_dec_FxD.at[at_C].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
    value, (to_pre_BxC, to_W_CxD) = explained(pre_BxC, W_dec_CxD)
    placed = dict(mode="drop", unique_indices=True, indices_are_sorted=True)
    to_pre_BxF = jnp.zeros_like(pre_BxF).at[:, at_C].set(to_pre_BxC, **placed)
    return value, (to_pre_BxF, jnp.zeros_like(W_dec_FxD).at[at_C].set(to_W_CxD, **placed))


_auxk.defvjp(
    _auxk_and_gradients,
    # The gradients were computed with the value, so that only the factor of the chain rule is left.
    lambda form, gradients, cotangent: (
        *(cotangent * gradient for gradient in gradients),
        None,
    ),
)

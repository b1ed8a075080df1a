"""AuxK (after Gao et al., 2024): dead features learn what the living leave over.

Where few features are dead, which is the rule, their columns alone are computed with, at an eighth of what a product
with all features costs. C counts the columns that there is room for.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from saejax.dictionaries import sparsity
from saejax.dictionaries.losses import squared_error
from saejax.dictionaries.matmul import matmul

Gradients = tuple[jax.Array, jax.Array]
_FEW, _LANES = 8, 128  # few are an eighth of the features, in whole lanes of a vector unit


def auxk(
    pre_BxF: jax.Array,
    dead_F: jax.Array,
    W_dec_FxD: jax.Array,
    error_BxD: jax.Array,
    k: int,
    matmul_dtype: str = "float32",
    metric_DxD: jax.Array | None = None,
    most_dead: jax.Array | int | None = None,
    all_columns: bool = False,
) -> jax.Array:
    """How badly the k strongest dead features explain what the living leave over.

    The error is a constant here, so that of the features this moves the dead and no others:

        min(dead / k, 1) * mean over tokens of |error - sum_i f_i W_dec_i|^2,   f = top-k of the dead pre-activations

    Args:
      pre_BxF: pre-activations.
      dead_F: True for dead features. Where none is dead the result is 0 and nothing is computed.
      error_BxD: y - y_hat.
      k: how many dead features act on each token, at least 1.
      matmul_dtype: dtype of the operands of the product.
      metric_DxD: as for ``squared_error``.
      most_dead: the largest number of dead features of members that are computed at the same time, by which it is
        chosen what is computed: their own numbers cannot choose there. None: that of ``dead_F``.
      all_columns: whether it is computed with all of them however few are dead, and none is moved.
    """
    most = jnp.sum(dead_F) if most_dead is None else jnp.asarray(most_dead)
    constants = dead_F, lax.stop_gradient(error_BxD), metric_DxD, most
    return _auxk(pre_BxF, W_dec_FxD, constants, k, matmul_dtype, all_columns)


def room_for_few(features: int, k: int) -> int:
    """Columns of the short way; 0 where it would not be shorter.

    Args:
      features: of the dictionary.
      k: how many dead ones act on each token.
    """
    room = -(-max(features // _FEW, k) // _LANES) * _LANES
    return room if 2 * room <= features else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _auxk(pre_BxF, W_dec_FxD, constants, k, matmul_dtype, all_columns):
    return _auxk_and_gradients(pre_BxF, W_dec_FxD, constants, k, matmul_dtype, all_columns)[0]


def _auxk_and_gradients(pre_BxF, W_dec_FxD, constants, k, matmul_dtype, all_columns):
    """Both in one branch: automatic differentiation would hand everything it keeps from one branch to another."""
    dead_F, error_BxD, metric_DxD, most = constants

    def explain(pre_BxC: jax.Array, W_dec_CxD: jax.Array) -> jax.Array:
        """Of columns of which all but dead ones are 0."""
        f_BxC = sparsity.topk(pre_BxC, k)
        share = jnp.minimum(jnp.sum(dead_F).astype(pre_BxC.dtype) / k, 1.0)
        return share * squared_error(error_BxD, matmul(f_BxC, W_dec_CxD, matmul_dtype), metric_DxD, matmul_dtype)

    explained = jax.value_and_grad(explain, argnums=(0, 1))

    def nothing(pre_BxF: jax.Array, W_dec_FxD: jax.Array) -> tuple[jax.Array, Gradients]:
        return jnp.zeros((), pre_BxF.dtype), (jnp.zeros_like(pre_BxF), jnp.zeros_like(W_dec_FxD))

    def with_all(pre_BxF: jax.Array, W_dec_FxD: jax.Array) -> tuple[jax.Array, Gradients]:
        value, (to_pre_BxF, to_W_FxD) = explained(jnp.where(dead_F[None], pre_BxF, jnp.zeros_like(pre_BxF)), W_dec_FxD)
        return value, (jnp.where(dead_F[None], to_pre_BxF, jnp.zeros_like(to_pre_BxF)), to_W_FxD)

    few = 0 if all_columns else room_for_few(len(dead_F), k)
    ways: list[Callable] = [nothing, with_all]
    way = jnp.int32(most > 0)
    if few:
        ways.insert(1, functools.partial(_few_columns, explained, dead_F, few))
        way += jnp.int32(most > few)
    return lax.switch(way, ways, pre_BxF, W_dec_FxD)


def _few_columns(
    explained: Callable[[jax.Array, jax.Array], tuple[jax.Array, Gradients]],
    dead_F: jax.Array,
    room: int,
    pre_BxF: jax.Array,
    W_dec_FxD: jax.Array,
) -> tuple[jax.Array, Gradients]:
    """``explained`` of the dead features' columns alone, at most ``room`` of them."""
    features = len(dead_F)
    (at_C,) = jnp.nonzero(dead_F, size=room, fill_value=features)
    at_C = jnp.where(at_C < features, at_C, features + jnp.arange(room))  # places that are none, no two of them alike
    pre_BxC = pre_BxF.at[:, at_C].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
    W_dec_CxD = W_dec_FxD.at[at_C].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
    value, (to_pre_BxC, to_W_CxD) = explained(pre_BxC, W_dec_CxD)
    placed = dict(mode="drop", unique_indices=True, indices_are_sorted=True)
    to_pre_BxF = jnp.zeros_like(pre_BxF).at[:, at_C].set(to_pre_BxC, **placed)
    return value, (to_pre_BxF, jnp.zeros_like(W_dec_FxD).at[at_C].set(to_W_CxD, **placed))


_auxk.defvjp(
    _auxk_and_gradients,
    lambda k, matmul_dtype, all_columns, gradients, cotangent: (
        *(cotangent * gradient for gradient in gradients),
        None,
    ),
)

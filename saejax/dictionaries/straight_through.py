"""Functions of a learnt threshold, with straight-through gradients (Rajamanoharan et al., 2024, JumpReLU SAEs).

A step has no useful derivative in its threshold, so the derivative of its expectation is estimated with a
rectangular kernel of width ``bandwidth``: only pre-activations within half of it of the threshold count. Thresholds
stay in float32: in bfloat16 their small steps would round away.
"""

import functools

import jax
import jax.numpy as jnp

from saejax.dictionaries.sparsity import row, threshold


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumprelu(pre_BxF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    """pre where it exceeds the threshold, else 0.

    Gradients: to ``pre`` where it exceeds the threshold; to the threshold
    -(threshold / bandwidth) sum over tokens of g 1[|pre - threshold| < bandwidth / 2].
    """
    return threshold(pre_BxF, threshold_F)


def _jumprelu_backward(bandwidth, saved, cotangent_BxF):
    pre_BxF, threshold_F = saved
    near_BxF = _near(pre_BxF, threshold_F, bandwidth)
    to_pre_BxF = jnp.where(pre_BxF > row(threshold_F, pre_BxF.ndim), cotangent_BxF, 0.0)
    return to_pre_BxF, -(threshold_F / bandwidth) * _over_tokens(near_BxF * cotangent_BxF)


jumprelu.defvjp(
    lambda pre_BxF, threshold_F, bandwidth: (threshold(pre_BxF, threshold_F), (pre_BxF, threshold_F)),
    _jumprelu_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(pre_BxF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    """1 where ``pre`` exceeds the threshold, else 0: its sum is L0.

    Gradients: none to ``pre``; to the threshold -(1 / bandwidth) sum over tokens of
    g 1[|pre - threshold| < bandwidth / 2].
    """
    return (pre_BxF > row(threshold_F, pre_BxF.ndim)).astype(pre_BxF.dtype)


def _step_backward(bandwidth, saved, cotangent_BxF):
    pre_BxF, threshold_F = saved
    near_BxF = _near(pre_BxF, threshold_F, bandwidth)
    return jnp.zeros_like(pre_BxF), -_over_tokens(near_BxF * cotangent_BxF) / bandwidth


step.defvjp(
    lambda pre_BxF, threshold_F, bandwidth: (
        (pre_BxF > row(threshold_F, pre_BxF.ndim)).astype(pre_BxF.dtype),
        (pre_BxF, threshold_F),
    ),
    _step_backward,
)


def _near(pre_BxF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    return (jnp.abs(pre_BxF - row(threshold_F, pre_BxF.ndim)) < bandwidth / 2).astype(pre_BxF.dtype)


def _over_tokens(values_BxF: jax.Array) -> jax.Array:
    return values_BxF.sum(tuple(range(values_BxF.ndim - 1)))

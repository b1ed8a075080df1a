"""Sparsity functions: from pre-activations ``pre_xF`` to activations of the same shape; leading dimensions are free.

Comparisons ask what is left out, not what is kept: a pre-activation that is NaN is no smaller than any threshold, so
that it stays NaN and is not taken for a feature that does not fire.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from saejax.dictionaries import selection


def gated(gate_xF: jax.Array, magnitude_xF: jax.Array) -> jax.Array:
    """Return max(magnitude, 0) where the gate is above 0, else 0 (Gated SAE; Rajamanoharan et al., 2024)."""
    return jnp.where(gate_xF <= 0, jnp.zeros_like(magnitude_xF), jax.nn.relu(magnitude_xF))


def threshold(pre_xF: jax.Array, threshold_F: jax.Array) -> jax.Array:
    """Return pre where it exceeds the feature's threshold, else 0 (JumpReLU; Rajamanoharan et al., 2024)."""
    return jnp.where(pre_xF <= row(threshold_F, pre_xF.ndim), jnp.zeros_like(pre_xF), pre_xF)


def topk(pre_xF: jax.Array, k: int | jax.Array, max_k: int | None = None) -> jax.Array:
    """Keep the k largest positive pre-activations of each token; the rest are 0.

    A token with fewer than k positive pre-activations keeps those. Values that tie with the k-th largest
    to the last bit are all kept. The gradient passes through the kept ones unchanged. Exact also where
    the feature axis is sharded.

    Args:
      pre_xF: pre-activations, float32 or wider (a bfloat16 input is widened for the comparison).
      k: 1 <= k; k >= F keeps every positive one. May be traced; then
      max_k: the largest k there can be, as a Python number.
    """
    acts_xF = jax.nn.relu(pre_xF)
    # The threshold only chooses which values pass; besides, its search is a loop without a backward pass.
    below_x1 = selection.kth_largest_below(lax.stop_gradient(acts_xF), k, max_k)
    return jnp.where(acts_xF <= below_x1, jnp.zeros_like(acts_xF), acts_xF)


def signed_topk(pre_xF: jax.Array, k: int | jax.Array, max_k: int) -> jax.Array:
    """Keep the k largest pre-activations of each token whatever their sign, as ``torch.topk`` does; the rest are 0.

    For inference alone: XLA sorts for it, and ties with the k-th largest are all kept. ``max_k`` is the largest k that
    there can be, as a Python number, where k is traced.
    """
    largest_xK = lax.top_k(pre_xF, min(max_k, pre_xF.shape[-1]))[0]
    index_x1 = jnp.full((*pre_xF.shape[:-1], 1), jnp.minimum(k, largest_xK.shape[-1]) - 1, jnp.int32)
    kth_x1 = jnp.take_along_axis(largest_xK, index_x1, axis=-1)
    return jnp.where(pre_xF < kth_x1, jnp.zeros_like(pre_xF), pre_xF)


def batch_topk(pre_BxF: jax.Array, k: int | jax.Array) -> jax.Array:
    """Keep the B k largest positive pre-activations of a whole batch (Bussmann et al., 2024), of any tokens."""
    acts_BxF = jax.nn.relu(pre_BxF)
    values_BxF = lax.stop_gradient(acts_BxF)
    left_out_BxF = values_BxF <= selection.batch_threshold(values_BxF, k)
    return jnp.where(left_out_BxF, jnp.zeros_like(acts_BxF), acts_BxF)


def lowest_level(acts_xF: jax.Array, pre_xF: jax.Array) -> jax.Array:
    """Return a threshold that exactly the activations exceed: halfway from the smallest to what is left out.

    The smallest itself as the threshold would leave it out, with those that tie with it, or rounding would decide.

    Args:
      acts_xF: activations, 0 where they are left out; where none is above 0 the threshold is 0.
      pre_xF: the pre-activations, of which these are the largest.
    """
    least = jnp.min(jnp.where(acts_xF > 0, acts_xF, jnp.inf))
    below = jnp.max(jnp.where(pre_xF < least, pre_xF, 0.0), initial=0.0)
    middle = below + (least - below) / 2
    return jnp.where(jnp.isfinite(least), jnp.where(middle < least, middle, below), 0.0)


def row(vector_N: jax.Array, ndim: int) -> jax.Array:
    """Return a vector as an array of ``ndim`` dimensions, so that adding it promotes no rank silently."""
    return vector_N.reshape((1,) * (ndim - 1) + vector_N.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumprelu(pre_BxF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    """Return ``threshold``, with straight-through gradients to the threshold (Rajamanoharan et al., 2024).

    A step has no useful derivative in its threshold, so the derivative of its expectation is estimated with a
    rectangular kernel of width ``bandwidth``: only pre-activations within half of it of the threshold count. Thresholds
    stay in float32: in bfloat16 their small steps would round away.

    Gradients: to ``pre`` where it exceeds the threshold; to the threshold
    -(threshold / bandwidth) sum over tokens of g 1[|pre - threshold| < bandwidth / 2].
    """
    return threshold(pre_BxF, threshold_F)


def _jumprelu_backward(bandwidth, saved, cotangent_BxF):
    """Return the gradients that ``jumprelu`` describes."""
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
    """Return 1 where ``pre`` exceeds the threshold, else 0: the sum is L0.

    Gradients: none to ``pre``; to the threshold -(1 / bandwidth) sum over tokens of
    g 1[|pre - threshold| < bandwidth / 2].
    """
    return (pre_BxF > row(threshold_F, pre_BxF.ndim)).astype(pre_BxF.dtype)


def _step_backward(bandwidth, saved, cotangent_BxF):
    """Return the gradients that ``step`` describes."""
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
    """Return 1 where a pre-activation is within half a bandwidth of the threshold, else 0."""
    return (jnp.abs(pre_BxF - row(threshold_F, pre_BxF.ndim)) < bandwidth / 2).astype(pre_BxF.dtype)


def _over_tokens(values_BxF: jax.Array) -> jax.Array:
    """Return the sum over all dimensions but the last."""
    return values_BxF.sum(tuple(range(values_BxF.ndim - 1)))

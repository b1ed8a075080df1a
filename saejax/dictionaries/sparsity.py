"""From pre-activations to sparse feature activations.

Every function takes ``pre_xF`` and returns ``acts_xF`` of the same shape; leading dimensions are free.
"""

import jax
import jax.numpy as jnp
from jax import lax

from saejax.dictionaries import selection


def relu(pre_xF: jax.Array) -> jax.Array:
    """max(pre, 0)."""
    return jax.nn.relu(pre_xF)


def gated(gate_xF: jax.Array, magnitude_xF: jax.Array) -> jax.Array:
    """max(magnitude, 0) where the gate is above 0, else 0 (Gated SAE; Rajamanoharan et al., 2024)."""
    return jnp.where(gate_xF > 0, jax.nn.relu(magnitude_xF), jnp.zeros_like(magnitude_xF))


def threshold(pre_xF: jax.Array, threshold_F: jax.Array) -> jax.Array:
    """pre where it exceeds the feature's threshold, else 0 (JumpReLU; Rajamanoharan et al., 2024)."""
    return jnp.where(pre_xF > row(threshold_F, pre_xF.ndim), pre_xF, jnp.zeros_like(pre_xF))


def topk(pre_xF: jax.Array, k: int | jax.Array, most: int | None = None) -> jax.Array:
    """Keeps the k largest positive pre-activations of each token; the rest are 0.

    A token with fewer than k positive pre-activations keeps those. Values that tie with the k-th largest
    to the last bit are all kept. The gradient passes through the kept ones unchanged. Exact also where
    the feature axis is sharded.

    Args:
      pre_xF: pre-activations, float32 or wider (a bfloat16 input is widened for the comparison).
      k: 1 <= k; k >= F keeps every positive one. May be traced; then
      most: is the largest k there can be, as a Python number.
    """
    acts_xF = jax.nn.relu(pre_xF)
    below_x1 = selection.kth_largest_below(lax.stop_gradient(acts_xF), k, most)
    return jnp.where(acts_xF > below_x1, acts_xF, jnp.zeros_like(acts_xF))


def signed_topk(pre_xF: jax.Array, k: int | jax.Array, most: int) -> jax.Array:
    """Keep the k largest pre-activations of each token whatever their sign, as ``torch.topk`` does; the rest are 0.

    For inference alone: XLA sorts for it, and ties with the k-th largest are all kept.

    Args:
      pre_xF: pre-activations.
      k: 1 <= k <= F; may be traced.
      most: the largest k there can be, as a Python number.
    """
    largest_xK = lax.top_k(pre_xF, min(most, pre_xF.shape[-1]))[0]
    index_x1 = jnp.full((*pre_xF.shape[:-1], 1), jnp.minimum(k, largest_xK.shape[-1]) - 1, jnp.int32)
    kth_x1 = jnp.take_along_axis(largest_xK, index_x1, axis=-1)
    return jnp.where(pre_xF >= kth_x1, pre_xF, jnp.zeros_like(pre_xF))


def batch_topk(pre_BxF: jax.Array, k: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keeps the B k largest positive pre-activations of a whole batch (Bussmann et al., 2024), of any tokens.

    Returns:
      The activations, and the smallest that was kept (0 if none is positive): what an inference threshold averages.
    """
    acts_BxF = jax.nn.relu(pre_BxF)
    values_BxF = lax.stop_gradient(acts_BxF)
    kept_BxF = values_BxF > selection.batch_threshold(values_BxF, k)
    smallest = jnp.min(jnp.where(kept_BxF, values_BxF, jnp.inf))
    return jnp.where(kept_BxF, acts_BxF, jnp.zeros_like(acts_BxF)), jnp.where(jnp.isfinite(smallest), smallest, 0.0)


def row(vector_N: jax.Array, ndim: int) -> jax.Array:
    """A vector as an array of ``ndim`` dimensions, so that adding it promotes no rank silently."""
    return vector_N.reshape((1,) * (ndim - 1) + vector_N.shape)

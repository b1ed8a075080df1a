"""Samples of a synthetic world, drawn on the devices.

Sampling follows SynthSAEBench (Chanin et al., arXiv 2602.14687), densely over all features:

1. Draw a standard normal latent for every feature, correlated through the factors. A latent above the feature's
   threshold meets the feature's condition to fire.
2. Draw the activations of these, max(0, normal); all others are 0.
3. From the roots of the trees down, silence children whose parent does not fire and scale the others by their parent's
   activation over its mean; of the active children of one parent keep one, each with the same probability.
4. x = code D + bias + noise.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from saejax.ground_truth.world import World, levels


def sample(world: World, key: jax.Array, count: int, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """Return vectors of the world, fp32 [B, D].

    Args:
      world: the world to sample from.
      key: key of the sample; the same key gives the same vectors on any devices.
      count: number of vectors B.
      sharding: sharding of the rows; None: one device.
    """
    return _sample(world, key, count, sharding)[0]


def sample_with_code(world: World, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return ``count`` vectors [B, D], those of ``sample`` by ``key``, and the activations of their features [B, J]."""
    return _sample(world, key, count, None)


@functools.partial(jax.jit, static_argnames=("count", "sharding"))
def _sample(
    world: World, key: jax.Array, count: int, sharding: jax.sharding.Sharding | None
) -> tuple[jax.Array, jax.Array]:
    factor_key, latent_key, size_key, sibling_key, noise_key = jax.random.split(key, 5)

    def place(rows: jax.Array) -> jax.Array:
        return rows if sharding is None else lax.with_sharding_constraint(rows, sharding)

    features, width = world.directions_JxD.shape
    factors_BxQ = place(jax.random.normal(factor_key, (count, world.loading_JxQ.shape[1])))
    # In full fp32, so that a key gives the same vectors on every kind of device.
    shift_BxJ = jnp.matmul(factors_BxQ, world.loading_JxQ.T, precision="highest")
    latent_BxJ = shift_BxJ + world.latent_std_J[None] * place(jax.random.normal(latent_key, (count, features)))
    size_BxJ = world.mean_J[None] + world.std_J[None] * place(jax.random.normal(size_key, (count, features)))
    code_BxJ = jnp.where(latent_BxJ > world.threshold_J[None], jax.nn.relu(size_BxJ), 0.0)
    # Level by level, as a child needs its parent after the parent's own gate.
    for level, (start, parents) in enumerate(levels(world.roots, world.branching, world.depth)):
        stop = start + parents * world.branching
        parent_BxP = code_BxJ[:, start - parents : start]
        gate_BxP = parent_BxP / world.mean_J[None, start - parents : start] if world.scaled else parent_BxP > 0
        child_BxPxC = code_BxJ[:, start:stop].reshape(count, parents, -1) * gate_BxP[..., None]
        if world.exclusive:
            # Noise of its own for each level.
            child_BxPxC = _keep_one(jax.random.fold_in(sibling_key, level), child_BxPxC)
        code_BxJ = code_BxJ.at[:, start:stop].set(child_BxPxC.reshape(count, -1))
    x_BxD = jnp.matmul(code_BxJ, world.directions_JxD, precision="highest") + world.bias_D[None]
    if world.noise:
        x_BxD += world.noise * jax.random.normal(noise_key, (count, width))
    return place(x_BxD), code_BxJ


def _keep_one(key: jax.Array, child_BxPxC: jax.Array) -> jax.Array:
    """Return the children's activations with one active child of each parent kept, chosen uniformly."""
    rank_BxPxC = jnp.cumsum(child_BxPxC > 0, axis=-1)  # 1 at the first active child, 2 at the second, ...
    uniform_BxP = jax.random.uniform(key, child_BxPxC.shape[:-1])
    chosen_BxP = 1 + jnp.floor(uniform_BxP * rank_BxPxC[..., -1]).astype(jnp.int32)
    return jnp.where(rank_BxPxC == chosen_BxP[..., None], child_BxPxC, 0.0)

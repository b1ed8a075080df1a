"""Vectors of a synthetic world, drawn on the devices."""

import jax
import jax.numpy as jnp

from saejax.ground_truth.world import World, levels

_EDGE = 1e-7  # of a uniform number, beyond which a normal one is cut: at 5.2 standard deviations


def draw(
    world: World, key: jax.Array, count: int, sharding: jax.sharding.Sharding | None = None
) -> tuple[jax.Array, jax.Array]:
    """So many vectors x_BxD, and which features they are made of, code_BxJ.

    In this order: (1) factors are drawn, and each feature's own condition to fire, given them; (2) activations of
    those whose condition is met, max(0, normal); (3) generation by generation, children whose parent does not fire are
    put out, the others scaled by their parent's activation over its mean, and of the children of one parent that are
    left one is kept, any with the same chance; (4) x = code D + bias + noise.

    Not to be traced: it is two programs, because in one XLA computes steps 1 and 2 anew wherever step 3 reads them, for
    every child, sibling and ancestor: five times as many processor seconds for trees of depth 3.

    Args:
      world: what is drawn from.
      key: of the draw.
      count: B.
      sharding: where the rows of both go; None: on one device.
    """
    own_key, *rest_keys = jax.random.split(key, 3)
    return _assembled(world, rest_keys, _own_activations(world, own_key, count, sharding), sharding)


@jax.jit(static_argnames="sharding")
def _assembled(
    world: World, keys: list[jax.Array], own_BxJ: jax.Array, sharding: jax.sharding.Sharding | None
) -> tuple[jax.Array, jax.Array]:
    """Steps 3 and 4."""
    child_key, noise_key = keys
    code_BxJ = _with_parents(world, child_key, own_BxJ)
    x_BxD = jnp.matmul(code_BxJ, world.directions_JxD, precision="highest") + world.bias_D[None]
    if world.noise:
        x_BxD += world.noise * jax.random.normal(noise_key, x_BxD.shape)
    return _placed(x_BxD, sharding), _placed(code_BxJ, sharding)


def _placed(rows: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    return rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Between 0 and 1, never 0, with the small ones as finely spaced as 32 bits allow."""
    return (jax.random.bits(key, shape).astype(jnp.float32) + 0.5) * 2.0**-32


@jax.jit(static_argnames=("count", "sharding"))
def _own_activations(
    world: World, key: jax.Array, count: int, sharding: jax.sharding.Sharding | None = None
) -> jax.Array:
    """Steps 1 and 2, [B, J], from one uniform number for each feature.

    A feature's condition is met with probability p, if u < p; then u / p is uniform again and gives its activation.
    """
    factor_key, own_key = jax.random.split(key)
    factors_BxQ = jax.random.normal(factor_key, (count, world.loading_JxQ.shape[1]))
    shift_BxJ = jnp.matmul(factors_BxQ, world.loading_JxQ.T, precision="highest")
    p_BxJ = jax.scipy.special.ndtr((shift_BxJ - world.threshold_J[None]) / world.own_J[None])
    u_BxJ = _uniform(own_key, p_BxJ.shape)
    rest_BxJ = jnp.clip(u_BxJ / p_BxJ, _EDGE, 1 - _EDGE)
    size_BxJ = world.mean_J[None] - world.std_J[None] * 2**0.5 * jax.lax.erf_inv(2 * rest_BxJ - 1)
    return _placed(jnp.where(u_BxJ < p_BxJ, jax.nn.relu(size_BxJ), 0.0), sharding)


def _with_parents(world: World, key: jax.Array, own_BxJ: jax.Array) -> jax.Array:
    """Step 3."""
    parts, parent = [own_BxJ[:, : world.roots]], own_BxJ[:, : world.roots]
    end, batch = world.roots, len(own_BxJ)
    for level, (start, parents) in enumerate(levels(world.roots, world.branching, world.depth)):
        end = start + parents * world.branching
        gate = parent / world.mean_J[None, start - parents : start] if world.scaled else (parent > 0)
        children = own_BxJ[:, start:end].reshape(batch, parents, world.branching) * gate[..., None]
        if world.exclusive:
            children = _one(jax.random.fold_in(key, level), children)
        parent = children.reshape(batch, -1)
        parts.append(parent)
    return jnp.concatenate([*parts, own_BxJ[:, end:]], axis=1)


def _one(key: jax.Array, children: jax.Array) -> jax.Array:
    """One of each parent's active children, [B, parents, branching]; the others are 0."""
    on = (children > 0).astype(jnp.float32)
    branching = children.shape[-1]
    rank = on @ jnp.triu(jnp.ones((branching, branching)))  # 1 at the first active one, 2 at the second, ...
    chosen = jnp.floor(_uniform(key, children.shape[:-1]) * rank[..., -1]) + 1
    return jnp.where(rank == chosen[..., None], children, 0.0)

"""A synthetic world: known directions, and how often, how strongly and with which others each of them is active.

The construction follows SynthSAEBench (Chanin et al., arXiv 2602.14687): Zipf firing rates, a hierarchy in which
children fire only with their parents, exclusion among siblings, a low-rank Gaussian copula, and directions that are
made more orthogonal. The random numbers are JAX's, so a world follows the benchmark's distribution without being the
published sample.

Vectors are drawn on the devices, densely over all features, and batch by batch from the batch's number alone:

1. Draw a standard normal latent for every feature, correlated through the factors. A latent above the feature's
   threshold meets the feature's condition to fire.
2. Draw the activations of these, max(0, normal); all others are 0.
3. From the roots of the trees down, silence children whose parent does not fire and scale the others by their parent's
   activation over its mean; of the active children of one parent keep one, each with the same probability.
4. x = code D + bias + noise.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.special import ndtri

from saejax.errors import UserError
from saejax.ground_truth.settings import TruthConfig

TRAIN, HELD_OUT = 1, 2  # splits; batches are numbered from 0 in each
_MIN_LATENT_VARIANCE = 0.01  # of a feature's latent, left unexplained by the factors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class World:
    """The distribution that vectors are sampled from; a pytree."""

    directions_JxD: jax.Array  #: unit vectors
    bias_D: jax.Array  #: added to every vector
    threshold_J: jax.Array  #: a feature's condition to fire is a standard normal latent above this
    loading_JxQ: jax.Array  #: loadings of the latents on the factors
    latent_std_J: jax.Array  #: standard deviation of the part of a latent that the factors leave unexplained
    #: mean_J and std_J: mean and standard deviation of the activations; negative ones are set to 0.
    mean_J: jax.Array
    std_J: jax.Array
    #: roots, branching, depth: shape of the trees.
    roots: int = dataclasses.field(metadata=dict(static=True))
    branching: int = dataclasses.field(metadata=dict(static=True))
    depth: int = dataclasses.field(metadata=dict(static=True))
    #: exclusive, scaled, noise: as in ``TruthConfig``.
    exclusive: bool = dataclasses.field(metadata=dict(static=True))
    scaled: bool = dataclasses.field(metadata=dict(static=True))
    noise: float = dataclasses.field(metadata=dict(static=True))

    @property
    def parent_J(self) -> np.ndarray:
        """The parent of each feature; -1 for roots and free features."""
        return parents(self.directions_JxD.shape[0], self.roots, self.branching, self.depth)


def levels(roots: int, branching: int, depth: int) -> Iterator[tuple[int, int]]:
    """Yield for every level below the roots its first feature and the number of its parents.

    Args:
      roots: number of trees.
      branching: children of a parent.
      depth: levels below the roots.
    """
    first, count = 0, roots
    for _ in range(depth if roots else 0):
        yield first + count, count
        first, count = first + count, count * branching


def parents(features: int, roots: int, branching: int, depth: int) -> np.ndarray:
    """Return the parent of each of ``features`` features, int [J]; -1 for roots and free features; see ``levels``."""
    parent_J = np.full(features, -1)
    for start, count in levels(roots, branching, depth):
        parent_J[start : start + count * branching] = np.repeat(np.arange(start - count, start), branching)
    return parent_J


def rates(config: TruthConfig) -> np.ndarray:
    """Return the intended firing rates, [J], in descending order."""
    first, last = config.rates
    zipf_J = np.arange(1, config.features + 1, dtype=np.float64) ** -config.rate_exponent
    span = zipf_J[0] - zipf_J[-1]
    # An exponent of 0, or one feature: all rates are equal, and there is nothing to scale.
    if not span:
        return np.full(config.features, first)
    return last + (zipf_J - zipf_J[-1]) * (first - last) / span


def conditional_rates(config: TruthConfig) -> np.ndarray:
    """Return the rates at which each feature's own condition is met, [J]: given its parent, it fires as intended.

    A child that a sibling may silence is raised by the siblings' rates, which makes up for part of the exclusion:
    p = q / q_parent * (1 + the sum of the siblings' q / q_parent).
    """
    rate_J, conditional_J = rates(config), rates(config)
    for start, count in levels(config.roots, config.branching, config.depth):
        conditional = rate_J[start : start + count * config.branching].reshape(count, -1)
        conditional = conditional / rate_J[start - count : start, None]
        raised = (
            conditional * (1 + conditional.sum(1, keepdims=True) - conditional) if config.exclusive else conditional
        )
        conditional_J[start : start + count * config.branching] = np.minimum(raised, 1).ravel()
    return conditional_J


def check(config: TruthConfig) -> None:
    """Raise a ``UserError`` if no world can have these settings."""
    in_trees = config.roots * sum(config.branching**level for level in range(config.depth + 1))
    if in_trees > config.features:
        raise UserError(
            f"--truth.roots={config.roots} trees of --truth.depth={config.depth} have {in_trees:,} features, more than "
            f"--truth.features={config.features:,}: lower one of the first two or raise the last"
        )
    if len(config.rates) != 2 or config.rates[0] < config.rates[1]:
        rates_given = ",".join(f"{rate:g}" for rate in config.rates)
        raise UserError(f"--truth.rates={rates_given}: expected the first feature's rate, and the last's, not larger")
    active = rates(config).sum()
    if active > config.dimensions:
        raise UserError(
            f"at these rates {active:.1f} features fire on a vector, more than --truth.dimensions={config.dimensions} "
            "can separate: lower --truth.rates or --truth.features"
        )


def make_world(config: TruthConfig) -> World:
    """Return the world of the settings and their seed.

    Raises:
      UserError: no world can have these settings.
    """
    check(config)
    count, width = config.features, config.dimensions
    # The world's own stream: batches take the splits' numbers, 1 and 2.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0), 4)
    directions_JxD = _unit(jax.random.normal(keys[0], (count, width)))
    if config.orthogonalise:
        directions_JxD = orthogonalise(directions_JxD, config.orthogonalise)
    loading_JxQ = config.correlation * jax.random.normal(keys[1], (count, config.factors))
    # The factors must leave a part of each latent unexplained, or its variance would not be 1.
    explained_J = jnp.sum(loading_JxQ**2, -1)
    limit = 1 - _MIN_LATENT_VARIANCE
    shrink_J = jnp.where(explained_J > limit, jnp.sqrt(limit / jnp.maximum(explained_J, 1e-9)), 1.0)
    loading_JxQ = loading_JxQ * shrink_J[:, None]
    deviation_J = config.magnitude_std + config.magnitude_spread * jax.random.normal(keys[2], (count,))
    return World(
        directions_JxD=directions_JxD,
        bias_D=config.bias * _unit(jax.random.normal(keys[3], (width,))),
        # Latents are standard normal: above this value lies the share that the rate says.
        threshold_J=jnp.asarray(-ndtri(conditional_rates(config)), jnp.float32),
        loading_JxQ=loading_JxQ,
        latent_std_J=jnp.sqrt(1 - jnp.sum(loading_JxQ**2, -1)),
        mean_J=jnp.linspace(config.magnitude_first, config.magnitude_last, count),
        # Drawn around their mean: a deviation below 0 means as much as above.
        std_J=jnp.abs(deviation_J),
        roots=config.roots,
        branching=config.branching,
        depth=config.depth,
        exclusive=config.exclusive,
        scaled=config.scaled,
        noise=config.noise,
    )


def _unit(values_xD: jax.Array) -> jax.Array:
    return values_xD / jnp.linalg.norm(values_xD, axis=-1, keepdims=True)


@jax.jit(static_argnums=1)
def orthogonalise(directions_JxD: jax.Array, steps: int, rate: float = 3e-4) -> jax.Array:
    """Return unit rows after steps of Adam on sum_(i != j) (d_i . d_j)^2 + J sum_i (|d_i|^2 - 1)^2.

    The first sum equals |D^T D|^2 - sum_i |d_i|^4, so no J by J matrix is needed.

    Args:
      directions_JxD: unit rows to start from.
      steps: number of steps.
      rate: learning rate of Adam.
    """
    optimizer = optax.adam(rate)

    def loss(directions_JxD: jax.Array) -> jax.Array:
        square_J = jnp.sum(directions_JxD**2, -1)
        gram_DxD = jnp.matmul(directions_JxD.T, directions_JxD, precision="highest")
        return jnp.sum(gram_DxD**2) - jnp.sum(square_J**2) + len(square_J) * jnp.sum((square_J - 1) ** 2)

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        directions_JxD, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(directions_JxD), moments)
        return (optax.apply_updates(directions_JxD, updates), moments), None

    (directions_JxD, _), _ = jax.lax.scan(step, (directions_JxD, optimizer.init(directions_JxD)), length=steps)
    return _unit(directions_JxD)


@functools.partial(jax.jit, static_argnames=("count", "sharding"))
def sample(
    world: World, key: jax.Array, count: int, sharding: jax.sharding.Sharding | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return vectors of the world, fp32 [B, D], and the activations of their features, [B, J].

    Args:
      world: the world to sample from.
      key: key of the sample; the same key gives the same vectors on any devices.
      count: number of vectors B.
      sharding: sharding of the rows; None: one device.
    """
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


@jax.jit(static_argnums=(0, 1))
def batch_key(seed: int, split: int, number: int | jax.Array) -> jax.Array:
    """Return the key of a batch by its number in a split, ``TRAIN`` or ``HELD_OUT``, of the world of a seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), split), number)

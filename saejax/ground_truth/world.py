"""A synthetic world: known directions, and how often, how strongly and with which others each of them is there.

The construction is that of SynthSAEBench (Chanin et al., arXiv 2602.14687): Zipf rates, a hierarchy in which children
fire only with their parents, exclusion among siblings, a low-rank Gaussian copula, and directions that were made more
orthogonal. The draws are JAX's, so a world is like that benchmark's and not the same.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import norm

from saejax.errors import UserError
from saejax.stages.ground_truth import TruthConfig

_LEAST_OWN = 0.01  # of a feature's latent variance, which no factors explain


class EntryRoom(NamedTuple):
    """How many roots of trees that fire, and free features that may, a vector has room for where few are looked at."""

    roots: int
    free: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class World:
    """What vectors are drawn from; a pytree.

    Attributes:
      directions_JxD: unit vectors.
      bias_D: what all vectors have in common.
      threshold_J: a feature's own condition to fire is a standard normal latent above this.
      loading_JxQ: of the latents on the factors.
      own_J: standard deviation of the rest of a latent.
      mean_J, std_J: of activations; those below 0 are 0.
      roots, branching, depth: shape of the trees.
      exclusive, scaled, noise: as in ``TruthConfig``.
      room: enough for nearly every batch; one that needs more is drawn with room for all.
    """

    directions_JxD: jax.Array
    bias_D: jax.Array
    threshold_J: jax.Array
    loading_JxQ: jax.Array
    own_J: jax.Array
    mean_J: jax.Array
    std_J: jax.Array
    roots: int = dataclasses.field(metadata=dict(static=True))
    branching: int = dataclasses.field(metadata=dict(static=True))
    depth: int = dataclasses.field(metadata=dict(static=True))
    exclusive: bool = dataclasses.field(metadata=dict(static=True))
    scaled: bool = dataclasses.field(metadata=dict(static=True))
    noise: float = dataclasses.field(metadata=dict(static=True))
    room: EntryRoom = dataclasses.field(metadata=dict(static=True))

    @property
    def in_trees(self) -> int:
        """How many features are in trees; they come first."""
        return in_trees(self.roots, self.branching, self.depth)

    @property
    def parent_J(self) -> np.ndarray:
        """The parent of each feature; -1 of those that have none."""
        return parents(self.directions_JxD.shape[0], self.roots, self.branching, self.depth)


def levels(roots: int, branching: int, depth: int) -> Iterator[tuple[int, int]]:
    """For every generation of trees below their roots, its first feature and how many parents it has.

    Args:
      roots: how many trees.
      branching: children of a parent.
      depth: generations below the roots.
    """
    first, count = 0, roots
    for _ in range(depth if roots else 0):
        yield first + count, count
        first, count = first + count, count * branching


def in_trees(roots: int, branching: int, depth: int) -> int:
    """How many features so many trees have. See ``levels``."""
    return roots * sum(branching**level for level in range(depth + 1))


def parents(features: int, roots: int, branching: int, depth: int) -> np.ndarray:
    """The parent of each of so many features [J], -1 of those that have none. See ``levels``."""
    parent_J = np.full(features, -1)
    for start, count in levels(roots, branching, depth):
        parent_J[start : start + count * branching] = np.repeat(np.arange(start - count, start), branching)
    return parent_J


def rates(config: TruthConfig) -> np.ndarray:
    """How often features are meant to fire [J], in falling order."""
    zipf_J = np.arange(1, config.features + 1, dtype=np.float64) ** -config.rate_exponent
    span = zipf_J[0] - zipf_J[-1]
    if not span:
        return np.full(config.features, config.rate_max)
    return config.rate_min + (zipf_J - zipf_J[-1]) * (config.rate_max - config.rate_min) / span


def own_rates(config: TruthConfig) -> np.ndarray:
    """How often each feature's own condition to fire is met [J], so that with its parent's it fires as often as meant.

    A child that may be put out by a sibling is raised for that, by the siblings' rates: p = q / q_parent x (1 + the sum
    of siblings' q / q_parent), which makes up for part of it.
    """
    rate_J, own_J = rates(config), rates(config)
    for start, count in levels(config.roots, config.branching, config.depth):
        given = rate_J[start : start + count * config.branching].reshape(count, -1)
        given = given / rate_J[start - count : start, None]
        raised = given * (1 + given.sum(1, keepdims=True) - given) if config.exclusive else given
        own_J[start : start + count * config.branching] = np.minimum(raised, 1).ravel()
    return own_J


def check(config: TruthConfig) -> None:
    """A ``UserError`` unless there is such a world."""
    tree = in_trees(config.roots, config.branching, config.depth)
    if tree > config.features:
        raise UserError(
            f"--truth.roots={config.roots} trees of --truth.depth={config.depth} have {tree:,} features, more than "
            f"--truth.features={config.features:,}"
        )
    if config.rate_min > config.rate_max:
        raise UserError(f"--truth.rate_min={config.rate_min:g} is above --truth.rate_max={config.rate_max:g}")
    active = rates(config).sum()
    if active > config.dimensions:
        raise UserError(
            f"with these rates {active:.1f} features fire at a time, more than --truth.dimensions={config.dimensions} "
            "can tell apart: lower --truth.rate_max, --truth.rate_min or --truth.features"
        )


def make_world(config: TruthConfig) -> World:
    """The world that the settings and their seed describe.

    Raises:
      UserError: there is none.
    """
    check(config)
    count, width = config.features, config.dimensions
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0), 4)
    directions_JxD = _unit(jax.random.normal(keys[0], (count, width)))
    if config.orthogonalise:
        directions_JxD = orthogonalised(directions_JxD, config.orthogonalise)
    loading_JxQ = config.correlation * jax.random.normal(keys[1], (count, config.factors))
    explained_J = jnp.sum(loading_JxQ**2, -1)
    shrink_J = jnp.where(explained_J > 1 - _LEAST_OWN, jnp.sqrt((1 - _LEAST_OWN) / jnp.maximum(explained_J, 1e-9)), 1.0)
    loading_JxQ = loading_JxQ * shrink_J[:, None]
    deviation_J = config.magnitude_std + config.magnitude_spread * jax.random.normal(keys[2], (count,))
    return World(
        directions_JxD=directions_JxD,
        bias_D=config.bias * _unit(jax.random.normal(keys[3], (width,))),
        threshold_J=jnp.asarray(norm.isf(own_rates(config)), jnp.float32),
        loading_JxQ=loading_JxQ,
        own_J=jnp.sqrt(1 - jnp.sum(loading_JxQ**2, -1)),
        mean_J=jnp.linspace(config.magnitude_first, config.magnitude_last, count),
        std_J=jnp.abs(deviation_J),
        roots=config.roots,
        branching=config.branching,
        depth=config.depth,
        exclusive=config.exclusive,
        scaled=config.scaled,
        noise=config.noise,
        room=_room(config),
    )


def _room(config: TruthConfig) -> EntryRoom:
    """A multiple of 16, far above what is expected; by its byte a 256th of free features may fire."""
    own_J, trees = own_rates(config), in_trees(config.roots, config.branching, config.depth)
    expected = own_J[: config.roots].sum(), np.minimum(own_J[trees:] + 1 / 256, 1).sum()
    whole = config.roots, config.features - trees
    return EntryRoom(
        *(
            min(16 * (int(1.5 * mean + 6 * mean**0.5 + 16) // 16), most)
            for mean, most in zip(expected, whole, strict=True)
        )
    )


def _unit(values_xD: jax.Array) -> jax.Array:
    return values_xD / jnp.linalg.norm(values_xD, axis=-1, keepdims=True)


@jax.jit(static_argnums=1)
def orthogonalised(directions_JxD: jax.Array, steps: int, rate: float = 3e-4) -> jax.Array:
    """Unit rows, the directions after steps of Adam on sum_(i != j) (d_i . d_j)^2 + J sum_i (|d_i|^2 - 1)^2.

    The first sum is |D^T D|^2 - sum_i |d_i|^4, so no J by J matrix is made. ``rate`` is Adam's.
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

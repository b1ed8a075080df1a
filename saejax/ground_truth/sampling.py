"""Vectors of a synthetic world, drawn on the devices.

Few features of a large world are active in a vector, so numbers that nothing depends on are not drawn: children only
where their tree's root fires, and a byte tells of most free features that they do not. On one CPU device the sum of the
active directions is a product with a sparse matrix.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.dictionaries import selection
from saejax.ground_truth.entries import ActiveEntries
from saejax.ground_truth.world import EntryRoom, World, levels

_EDGE = 1e-7  # of a uniform number, beyond which a normal one is cut: at 5.2 standard deviations
_BYTE = 256


def draw(world: World, key: jax.Array, count: int, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """So many vectors, x_BxD.

    In this order: (1) factors are drawn, and each feature's own condition to fire, given them; (2) activations of
    those whose condition is met, max(0, normal); (3) generation by generation, children whose parent does not fire are
    put out, the others scaled by their parent's activation over its mean, and of the children of one parent that are
    left one is kept, any with the same chance; (4) x = code D + bias + noise.

    Args:
      world: what is drawn from.
      key: of the draw.
      count: B.
      sharding: where the rows go; None: on one device.
    """
    return _draw(world, key, count, sharding, with_code=False)[0]


def draw_with_code(world: World, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The same vectors, on one device, and the activations of the features that they are made of, code_BxJ.

    Args:
      world, key, count: as for ``draw``.
    """
    return _draw(world, key, count, None, with_code=True)


@jax.jit(static_argnames=("count", "sharding", "with_code"))
def _draw(
    world: World, key: jax.Array, count: int, sharding: jax.sharding.Sharding | None, with_code: bool
) -> tuple[jax.Array, ...]:
    factor_key, root_key, child_key, free_key, noise_key = jax.random.split(key, 5)
    factors_BxQ = _placed(jax.random.normal(factor_key, (count, world.loading_JxQ.shape[1])), sharding)
    roots_BxC = _roots(world, root_key, factors_BxQ)
    free = _Free.of(world, free_key, factors_BxQ)
    one_device = sharding is None or sharding.num_devices == 1

    def vectors(room: EntryRoom) -> tuple[jax.Array, ...]:
        codes = _trees(world, child_key, factors_BxQ, roots_BxC, room.roots), free.code(room.free)
        code = ActiveEntries(*(jnp.concatenate(parts, axis=1) for parts in zip(*codes, strict=True)))
        x_BxD = code.total(world.directions_JxD, one_device) + world.bias_D[None]
        if world.noise:
            x_BxD += world.noise * jax.random.normal(noise_key, x_BxD.shape)
        return (x_BxD, code.dense(len(world.directions_JxD))) if with_code else (x_BxD,)

    whole = EntryRoom(roots_BxC.shape[1], free.chance_BxC.shape[1])
    if world.room == whole:
        drawn = vectors(whole)
    else:
        fits = (_most(roots_BxC) <= world.room.roots) & (_most(free.chance_BxC) <= world.room.free)
        drawn = lax.cond(fits, lambda: vectors(world.room), lambda: vectors(whole))
    return tuple(_placed(rows, sharding) for rows in drawn)


def _roots(world: World, key: jax.Array, factors_BxQ: jax.Array) -> jax.Array:
    """Activations of the trees' roots."""
    own = slice(0, world.roots)
    met_BxC = _met(_uniform(key, (len(factors_BxQ), world.roots)), _chances(world, factors_BxQ, own))
    return _sizes(met_BxC, world.mean_J[None, own], world.std_J[None, own])


def _trees(world: World, key: jax.Array, factors_BxQ: jax.Array, roots_BxC: jax.Array, room: int) -> ActiveEntries:
    """Steps 1 to 3 for all features of trees, of whose roots so many have a place, W."""
    value_BxW, feature_BxW = _kept(roots_BxC, room)
    values, features = [value_BxW], [feature_BxW]
    for level, (start, parents) in enumerate(levels(world.roots, world.branching, world.depth)):
        own, place_BxW = slice(start, start + parents * world.branching), features[-1] - (start - parents)
        below = functools.partial(_of_children, place_BxW=place_BxW, branching=world.branching)
        of_child = world.threshold_J, world.own_J, world.mean_J, world.std_J
        threshold, rest, mean, std = (below(of_J[None, own]) for of_J in of_child)
        chance = _chance(below(_shift(world, factors_BxQ, own)), threshold, rest)
        parent_key, child_key = jax.random.split(jax.random.fold_in(key, level))
        gate_BxW = values[-1] / world.mean_J[features[-1]] if world.scaled else (values[-1] > 0)
        child = _sizes(_met(_uniform(child_key, chance.shape), chance), mean, std) * gate_BxW[..., None]
        feature = below(jnp.arange(own.start, own.stop, dtype=jnp.int32)[None])
        if world.exclusive:
            child, feature = _one(parent_key, child, feature)
        values.append(child.reshape(len(child), -1))
        features.append(feature.reshape(len(child), -1))
    return ActiveEntries(jnp.concatenate(values, axis=1), jnp.concatenate(features, axis=1))


def _of_children(values: jax.Array, place_BxW: jax.Array, branching: int) -> jax.Array:
    """Of values for all children of a generation those of parents at these places, [B, W, branching].

    Args:
      values: [B, C], or [1, C] where all vectors have the same.
      place_BxW: of the parents in their generation.
      branching: children of a parent.
    """
    of_parents = values.reshape(len(values), -1, branching)
    if len(values) == 1:
        return of_parents[0][place_BxW]
    return jnp.take_along_axis(of_parents, place_BxW[..., None], axis=1)


def _one(key: jax.Array, child: jax.Array, feature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One of each parent's active children, [B, W, branching], and which; both [B, W], 0 and any if none is active."""
    rank = jnp.cumsum(child > 0, axis=-1)  # 1 at the first active one, 2 at the second, ...
    chosen_BxW = jnp.floor(_uniform(key, child.shape[:-1]) * rank[..., -1]).astype(jnp.int32) + 1
    chosen = (child > 0) & (rank == chosen_BxW[..., None])
    place_BxWx1 = jnp.argmax(chosen, axis=-1, keepdims=True)
    feature_BxW = jnp.take_along_axis(feature, place_BxWx1, axis=-1)[..., 0]
    return jnp.sum(jnp.where(chosen, child, 0.0), axis=-1), feature_BxW


class _Free(NamedTuple):
    """The features of no tree, of which a byte tells which may fire.

    With a byte b and a uniform v, (b + v) / 256 is uniform, and b > 256 p tells that it is not below p whatever v is.

    Attributes:
      chance_BxC: with which probability p the feature fires; 0 where it does not.
      byte_BxC: b.
      key: of v and of activations.
    """

    world: World
    chance_BxC: jax.Array
    byte_BxC: jax.Array
    key: jax.Array

    @classmethod
    def of(cls, world: World, key: jax.Array, factors_BxQ: jax.Array) -> "_Free":
        byte_key, rest_key = jax.random.split(key)
        chance_BxC = _chances(world, factors_BxQ, slice(world.in_trees, None))
        batch, count = chance_BxC.shape
        words = jax.random.bits(byte_key, (batch, -(-count // 4)))
        byte_BxC = lax.bitcast_convert_type(words, jnp.uint8).reshape(batch, -1)[:, :count]
        return cls(world, jnp.where(byte_BxC <= _BYTE * chance_BxC, chance_BxC, 0.0), byte_BxC, rest_key)

    def code(self, room: int) -> ActiveEntries:
        """Steps 1 and 2 for these features, of which so many have a place."""
        chance_BxW, place_BxW = _kept(self.chance_BxC, room)
        byte_BxW = jnp.take_along_axis(self.byte_BxC, place_BxW, axis=1).astype(jnp.float32)
        met_BxW = _met((byte_BxW + _uniform(self.key, byte_BxW.shape)) / _BYTE, chance_BxW)
        feature_BxW = self.world.in_trees + place_BxW
        size_BxW = _sizes(met_BxW, self.world.mean_J[feature_BxW], self.world.std_J[feature_BxW])
        return ActiveEntries(size_BxW, feature_BxW)


def _chances(world: World, factors_BxQ: jax.Array, own: slice) -> jax.Array:
    """With which probability each feature's own condition to fire is met, given the factors."""
    return _chance(_shift(world, factors_BxQ, own), world.threshold_J[None, own], world.own_J[None, own])


def _shift(world: World, factors_BxQ: jax.Array, own: slice) -> jax.Array:
    return jnp.matmul(factors_BxQ, world.loading_JxQ[own].T, precision="highest")


def _chance(shift: jax.Array, threshold: jax.Array, own: jax.Array) -> jax.Array:
    return jax.scipy.special.ndtr((shift - threshold) / own)


def _met(uniform: jax.Array, chance: jax.Array) -> jax.Array:
    """0 where a condition is not met, elsewhere another uniform number: if u < p, u / p is one again."""
    return jnp.where(uniform < chance, uniform / chance, 0.0)


def _sizes(met: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Activations, from what ``_met`` gives."""
    normal = 2**0.5 * lax.erf_inv(2 * jnp.clip(met, _EDGE, 1 - _EDGE) - 1)
    return jnp.where(met > 0, jax.nn.relu(mean - std * normal), 0.0)


def _kept(value_BxC: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
    """All values above 0 of each row, of which there is room for so many, and where they are; both [B, W]."""
    if room < value_BxC.shape[1]:
        return selection.largest(value_BxC, room, room)
    return value_BxC, jnp.broadcast_to(jnp.arange(value_BxC.shape[1], dtype=jnp.int32)[None], value_BxC.shape)


def _most(value_BxC: jax.Array) -> jax.Array:
    """How many values of a row are above 0, at the most."""
    return jnp.max(jnp.sum(value_BxC > 0, axis=1))


def _placed(rows: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    return rows if sharding is None else lax.with_sharding_constraint(rows, sharding)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Between 0 and 1, never 0, with the small ones as finely spaced as 32 bits allow."""
    return (jax.random.bits(key, shape).astype(jnp.float32) + 0.5) * 2.0**-32

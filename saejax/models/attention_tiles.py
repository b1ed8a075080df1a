"""Attention of long prompts, whose scores are never all in memory: softmax tile by tile.

A tile is some queries by some keys. What the keys before it gave is corrected by the largest score so far (Milakov and
Gimelshein, 2018, arXiv 1805.02867; Dao et al., 2022, arXiv 2205.14135), so that memory grows with the tokens and not
with their square. One loop runs over queries, one within it over the keys up to theirs; a gradient computes each tile
again.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.layers import at_least_float32, einsum

TILES_FROM = 2048  # tokens of a prompt
_SIDE = 512  # tokens of a tile: as many queries, and as many keys

# The scores [..., N, G, T, S] of a tile's queries [..., N, G, T, K] and keys [..., N, S, K], given the places of the
# first of each; -inf where a query does not attend to a key.
Scores = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Softmax(NamedTuple):
    """The softmax of some queries over the keys so far.

    Attributes:
      largest: score of each query, [..., N, G, T, 1]; -inf before the first key that it attends to.
      total: of the exponentials of scores less that, as large.
      sums: of the values, each times its exponential, [..., N, G, T, K].
    """

    largest: jax.Array
    total: jax.Array
    sums: jax.Array

    def with_tile(self, scores_xNxGxTxS: jax.Array, v_xNxSxK: jax.Array) -> "Softmax":
        """Over the keys of one tile more.

        Args:
          scores_xNxGxTxS: of the queries with its keys.
          v_xNxSxK: its values.
        """
        tile = lax.stop_gradient(jnp.max(scores_xNxGxTxS, axis=-1, keepdims=True))
        largest = jnp.maximum(self.largest, tile)
        level = jnp.where(jnp.isfinite(largest), largest, 0.0)
        before, shares_xNxGxTxS = jnp.exp(self.largest - level), jnp.exp(scores_xNxGxTxS - level)
        given = einsum("...ngts,...nsk->...ngtk", shares_xNxGxTxS.astype(v_xNxSxK.dtype), v_xNxSxK)
        total = self.total * before + jnp.sum(shares_xNxGxTxS, axis=-1, keepdims=True)
        return Softmax(largest, total, self.sums * before + given)


def attend_in_tiles(scores: Scores, q_xNxGxTxK: jax.Array, k_xNxSxK: jax.Array, v_xNxSxK: jax.Array) -> jax.Array:
    """The mean of the values that each query attends to, [..., N, G, T, K], in the wide dtype.

    Args:
      scores: gives those of a tile.
      q_xNxGxTxK: queries of ``whole_tiles``, of which none attends to a later token.
      k_xNxSxK, v_xNxSxK: keys and values of the same tokens.
    """
    tiles = q_xNxGxTxK.shape[-2] // _SIDE

    def tile(rows: jax.Array, q_xNxGxTxK: jax.Array, softmax: Softmax, place: jax.Array) -> Softmax:
        k, v = (_tile(array, place) for array in (k_xNxSxK, v_xNxSxK))
        return softmax.with_tile(scores(q_xNxGxTxK, k, rows * _SIDE, place * _SIDE), v)

    @jax.checkpoint
    def row(_: None, rows: jax.Array) -> tuple[None, jax.Array]:
        q = _tile(q_xNxGxTxK, rows)

        @jax.checkpoint
        def next_tile(softmax: Softmax, place: jax.Array) -> tuple[Softmax, None]:
            seen = functools.partial(tile, rows, q)
            return lax.cond(place <= rows, seen, lambda softmax, _: softmax, softmax, place), None

        zeros = jnp.zeros_like(q, dtype=at_least_float32(q))
        start = Softmax(jnp.full_like(zeros[..., :1], -jnp.inf), zeros[..., :1], zeros)
        softmax, _ = lax.scan(next_tile, start, jnp.arange(tiles))
        return None, softmax.sums / jnp.where(softmax.total > 0, softmax.total, 1.0)

    _, found = lax.scan(row, None, jnp.arange(tiles))
    return jnp.moveaxis(found, 0, -3).reshape(q_xNxGxTxK.shape)


def whole_tiles(length: int) -> int:
    """The tokens of as many tiles as hold so many.

    Args:
      length: in tokens.
    """
    return -(-length // _SIDE) * _SIDE


def _tile(array: jax.Array, place: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, place * _SIDE, _SIDE, axis=-2)

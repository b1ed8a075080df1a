"""Which tokens attend to which, and how far they stand apart, as tables for a program.

S counts the tokens that are attended to: T where tokens attend to one another, the slots of a cache with one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.models.config import DecoderConfig, Rope
from saejax.models.layers import like, wide


class AttentionTables(NamedTuple):
    """What attention in a layer needs beside queries, keys and values.

    Attributes:
      rope: cosine and sine of each query's angles, [T, R] or [B, T, R] for R pairs of dimensions, fp32; None: none.
      mask: True where a query attends to a key, [T, S] or [B, T, S].
      scale: factor on the scores.
    """

    rope: tuple[jax.Array, jax.Array] | None
    mask: jax.Array
    scale: float | jax.Array


class TablesByLayer(NamedTuple):
    """The tables of layers whose queries attend to all earlier tokens, and those of local layers."""

    everywhere: AttentionTables
    nearby: AttentionTables

    def at(self, config: DecoderConfig, layer: int | jax.Array) -> AttentionTables:
        """The tables of a layer, whose number may be known only when the program runs."""
        tables = self.everywhere
        if all(config.local) and config.local:
            tables = self.nearby
        elif any(config.local) and isinstance(layer, int):
            tables = self.nearby if config.local[layer] else self.everywhere
        elif any(config.local):
            local = jnp.array(config.local)[layer]
            tables = jax.tree.map(lambda far, near: jnp.where(local, near, far), self.everywhere, self.nearby)
        return tables._replace(scale=tables.scale / (layer + 1)) if config.scale_by_layer else tables


def whole_prompts(config: DecoderConfig, length: int) -> TablesByLayer:
    """For tokens at positions 0 to ``length - 1`` that attend to one another."""
    index_T = jnp.arange(length)
    age_TxS = index_T[:, None] - index_T[None, :]
    return tables_by_layer(config, index_T, age_TxS, age_TxS >= 0)


def tables_by_layer(config: DecoderConfig, positions: jax.Array, age: jax.Array, mask: jax.Array) -> TablesByLayer:
    """Tables for any tokens.

    Args:
      positions: of the tokens, [T] or [B, T].
      age: by how many positions each key is before the query, [T, S] or [B, T, S].
      mask: where a query attends to a key unless its layer is local, [T, S] or [B, T, S].
    """
    everywhere = AttentionTables(_rope_tables(config.rope, positions), mask, config.score_scale)
    if not any(config.local):
        return TablesByLayer(everywhere, everywhere)
    near, rope = like(age < config.window, mask) & mask, _rope_tables(config.local_rope or config.rope, positions)
    return TablesByLayer(everywhere, AttentionTables(rope, near, everywhere.scale))


def _rope_tables(rope: Rope | None, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """Cosine and sine of position times frequency, each [..., R], fp32."""
    if rope is None:
        return None
    frequencies_R = np.array(rope.frequencies, np.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies_R.reshape((1,) * positions.ndim + (-1,))
    return rope.gain * jnp.cos(angles), rope.gain * jnp.sin(angles)


def rotate(x_xTxHxK: jax.Array, rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Rotary embedding (Su et al., 2021) in the half-split layout: of 2R dimensions, i turns with i + R."""
    if rope is None:
        return x_xTxHxK
    cos, sin = (like(table[..., None, :], x_xTxHxK) for table in rope)
    pairs = cos.shape[-1]
    x = x_xTxHxK.astype(wide(x_xTxHxK))
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_xTxHxK.dtype)

"""Running some tokens of prompts whose earlier tokens stay as they were: the ends of edited prompts, beside a past."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.attention import QKV, Attend, Layer, RunAttention
from saejax.models.attention_tables import TablesByLayer, tables_by_layer
from saejax.models.config import DecoderConfig


class Past(NamedTuple):
    """Keys, after the rotary embedding, and values of whole prompts (P of S tokens) in L consecutive layers."""

    k_LxPxSxNxK: jax.Array
    v_LxPxSxNxK: jax.Array


class Tree(NamedTuple):
    """Edited prompts, of which those that begin alike share their first tokens: S shards of R rows and N tokens.

    A row is the end of a prompt from its first changed token on, T tokens at most. Each shard is by itself.

    Attributes:
      place_SxR: which of the past's prompts each row continues.
      first_SxR: the position of its first token.
      token_SxRxT: which of the shard's N tokens stands there; any, where the row has ended.
      row_SxN, column_SxN: one of the places at which each token stands.
    """

    place_SxR: jax.Array
    first_SxR: jax.Array
    token_SxRxT: jax.Array
    row_SxN: jax.Array
    column_SxN: jax.Array

    @classmethod
    def unshared(cls, place_X: jax.Array, first_X: jax.Array, length: int, shards: int) -> "Tree":
        """Rows of which each has ``length`` tokens of its own, in order."""
        count = len(place_X) // shards
        token_RxT = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
        row_N, column_N = jnp.divmod(token_RxT.reshape(-1), length)
        shared = (jnp.broadcast_to(array[None], (shards, *array.shape)) for array in (token_RxT, row_N, column_N))
        return cls(place_X.reshape(shards, count), first_X.reshape(shards, count), *shared)

    def of_tokens(self, array_SxRx: jax.Array) -> jax.Array:
        """What holds for the row in which each token stands, [S, N, ...] of [S, R, ...]."""
        return jax.vmap(lambda array_Rx, row_N: array_Rx[row_N])(array_SxRx, self.row_SxN)

    @property
    def place_SxN(self) -> jax.Array:
        """The prompt of each token."""
        return self.of_tokens(self.place_SxR)

    @property
    def position_SxN(self) -> jax.Array:
        """The position of each token."""
        return self.of_tokens(self.first_SxR) + self.column_SxN

    def attention(self, config: DecoderConfig, past: Past, below: int) -> RunAttention:
        """How the tokens attend to the earlier ones of their rows and to those of the past before their first.

        All but attention acts on each token once, however many rows share it. A run gives the same as full runs of the
        rows in which nothing before their first tokens is changed.

        Args:
          past: keys and values of the prompts without an edit, in the layers of the run at least.
          below: the past's first layer.
        """

        def function(attend: Attend, layer: Layer, qkv: QKV, carried: tuple[()]) -> tuple[jax.Array, tuple[()]]:
            k_known, v_known = (lax.dynamic_index_in_dim(part, layer - below, keepdims=False) for part in past)
            q, k, v = (jax.vmap(lambda part, token: part[token])(part, self.token_SxRxT) for part in qkv)
            k = jnp.concatenate([k_known[self.place_SxR], k], axis=2)
            v = jnp.concatenate([v_known[self.place_SxR], v], axis=2)
            attended_SxRxTxHxK = attend(q, k, v)
            of_token = jax.vmap(lambda part, row, column: part[row, column])
            return of_token(attended_SxRxTxHxK, self.row_SxN, self.column_SxN), carried

        return RunAttention(self._tables(config, past.k_LxPxSxNxK.shape[2]), function)

    def _tables(self, config: DecoderConfig, known: int) -> TablesByLayer:
        """Rotary tables of the N tokens; masks [S, R, T, known + T] of rows, which see what is known before them."""
        first_SxRx1, new = self.first_SxR[..., None], self.token_SxRxT.shape[2]
        position_SxRxT = first_SxRx1 + jnp.arange(new)[None, None, :]
        known_SxRxC = jnp.broadcast_to(jnp.arange(known)[None, None, :], (*self.first_SxR.shape, known))
        slot_SxRxW = jnp.concatenate([known_SxRxC, position_SxRxT], axis=-1)
        age_SxRxTxW = position_SxRxT[..., :, None] - slot_SxRxW[..., None, :]
        real_SxRxW = jnp.concatenate([known_SxRxC < first_SxRx1, jnp.ones_like(position_SxRxT, bool)], axis=-1)
        mask_SxRxTxW = (age_SxRxTxW >= 0) & real_SxRxW[..., None, :]
        return tables_by_layer(config, self.position_SxN, age_SxRxTxW, mask_SxRxTxW)

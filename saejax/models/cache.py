"""The keys and values that decoding keeps, so that each token is computed once.

A cache has S slots a prompt. Prompts are padded on the left, so that all of them end at the same slot: slot s of
prompt b holds the token at position ``s - pad_B[b]``, and the first ``pad_B[b]`` slots hold padding, which no token
attends to.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from saejax.models.attention import QKV, Attend, Layer, RunAttention
from saejax.models.attention_tables import tables_by_layer
from saejax.models.config import DecoderConfig

Stores = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens that went before, in every layer.

    Attributes:
      k_LxBxSxNxK: keys, after the rotary embedding.
      v_LxBxSxNxK: values.
      pad_B: int32 number of slots, from the left, that hold padding.
      length: int32 number of slots that are written, the same for all prompts.
    """

    k_LxBxSxNxK: jax.Array
    v_LxBxSxNxK: jax.Array
    pad_B: jax.Array
    length: jax.Array

    def positions_BxT(self, new: int) -> jax.Array:
        """Positions of the next ``new`` tokens, [B, T] int32; padding is at 0."""
        slots_T = self.length + jnp.arange(new)
        return jnp.maximum(slots_T[None, :] - self.pad_B[:, None], 0)

    def attention(self, config: DecoderConfig, new: int) -> RunAttention:
        """How ``new`` tokens attend to themselves and to those in the cache.

        T is the length of the (left padded) prompts at first and 1 while decoding. The caller sees to it that there is
        room for them. What stands at padding means nothing.

        Args:
          new: how many tokens there are (T).

        Returns:
          The attention of a run of all layers, which carries the keys and values on; see ``grown``.
        """
        slots_S = jnp.arange(self.k_LxBxSxNxK.shape[2])
        age_TxS = (self.length + jnp.arange(new))[:, None] - slots_S[None, :]
        real_Bx1xS = (slots_S[None, :] >= self.pad_B[:, None])[:, None]
        # Padding attends to itself, so that it stays finite: a value that is no number would reach all through 0 * NaN.
        mask_BxTxS = (age_TxS >= 0)[None] & real_Bx1xS | (age_TxS == 0)[None]

        def function(attend: Attend, layer: Layer, qkv: QKV, stores: Stores) -> tuple[jax.Array, Stores]:
            start = (layer, 0, self.length, 0, 0)
            k_store, v_store = (
                lax.dynamic_update_slice(store, value[None].astype(store.dtype), start)
                for store, value in zip(stores, qkv[1:], strict=True)
            )
            k, v = (lax.dynamic_index_in_dim(store, layer, keepdims=False) for store in (k_store, v_store))
            return attend(qkv[0], k, v), (k_store, v_store)

        tables = tables_by_layer(config, self.positions_BxT(new), age_TxS, mask_BxTxS)
        return RunAttention(tables, function, (self.k_LxBxSxNxK, self.v_LxBxSxNxK))

    def grown(self, stores: Any, new: int) -> "Cache":
        """The cache with ``new`` tokens in it, from the stores of keys and values that their run carried on."""
        k_LxBxSxNxK, v_LxBxSxNxK = stores
        return Cache(k_LxBxSxNxK, v_LxBxSxNxK, self.pad_B, self.length + new)


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: DTypeLike, pad_B: jax.Array) -> Cache:
    """A cache with nothing in it.

    Args:
      batch: number of prompts (B).
      slots: tokens that it can take, padding and new ones together (S).
      dtype: that of the parameters.
      pad_B: number of padding tokens to the left of each prompt.
    """
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.d_head)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.asarray(pad_B, jnp.int32), jnp.zeros((), jnp.int32)
    )

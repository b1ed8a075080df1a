"""The keys and values that decoding keeps, so that each token is computed once.

A cache has S slots a prompt. Prompts are padded on the left, so that all of them end at the same slot: slot s of
prompt b holds the token at position ``s - pad_B[b]``, and the first ``pad_B[b]`` slots hold padding, which no token
attends to.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from saejax.models.config import DecoderConfig


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

"""The programs that make new tokens: one reads the prompts, one decodes with a cache, one computes all anew.

Prompts with a cache are padded on the left, so that all of them end at the same slot and every new token of the
batch goes to the next one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from saejax.models import decoder
from saejax.models.attention import QKV, Attend, AttentionSpec, Layer, tables_by_layer
from saejax.models.config import DecoderConfig
from saejax.models.decoder import Params, run_layers
from saejax.models.edits import Edit, ForwardPass, edited_layers

Stores = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
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

    def attention(self, config: DecoderConfig, new: int) -> AttentionSpec:
        """How ``new`` tokens attend to themselves and to those in the cache.

        T is the length of the (left padded) prompts at first and 1 while decoding. The caller sees to it that there is
        room for them. What stands at padding means nothing.

        Args:
          new: how many tokens there are (T).

        Returns:
          The attention of a run of all layers, which carries the keys and values on; see ``grown``.
        """
        slots_S = jnp.arange(self.k_LxBxSxNxK.shape[2])
        relative_position_TxS = (self.length + jnp.arange(new))[:, None] - slots_S[None, :]
        real_Bx1xS = (slots_S[None, :] >= self.pad_B[:, None])[:, None]
        # Padding attends to itself, so that it stays finite: a value that is no number would reach all through 0 * NaN.
        mask_BxTxS = (relative_position_TxS >= 0)[None] & real_Bx1xS | (relative_position_TxS == 0)[None]

        def function(attend: Attend, layer: Layer, qkv: QKV, stores: Stores) -> tuple[jax.Array, Stores]:
            start = (layer, 0, self.length, 0, 0)
            k_store, v_store = (
                lax.dynamic_update_slice(store, value[None].astype(store.dtype), start)
                for store, value in zip(stores, qkv[1:], strict=True)
            )
            k, v = (lax.dynamic_index_in_dim(store, layer, keepdims=False) for store in (k_store, v_store))
            return attend(qkv[0], k, v), (k_store, v_store)

        tables = tables_by_layer(config, self.positions_BxT(new), relative_position_TxS, mask_BxTxS)
        return AttentionSpec(tables, function, (self.k_LxBxSxNxK, self.v_LxBxSxNxK))

    def grown(self, stores: Any, new: int) -> "KVCache":
        """The cache with ``new`` tokens in it, from the stores of keys and values that their run carried on."""
        k_LxBxSxNxK, v_LxBxSxNxK = stores
        return KVCache(k_LxBxSxNxK, v_LxBxSxNxK, self.pad_B, self.length + new)


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: DTypeLike, pad_B: jax.Array) -> KVCache:
    """A cache with nothing in it.

    Args:
      batch: number of prompts (B).
      slots: tokens that it can take, padding and new ones together (S).
      dtype: that of the parameters.
      pad_B: number of padding tokens to the left of each prompt.
    """
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.d_head)
    return KVCache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.asarray(pad_B, jnp.int32), jnp.zeros((), jnp.int32)
    )


Edits = tuple[Edit, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Static: ``sampled``, ``nucleus``.

    Attributes:
      temperature: fp32 scalar, by which the logits are divided.
      top_p: fp32 scalar; only the most probable tokens are drawn from, as few as have this probability together.
      key: of the draws; token n of prompt b has its own.
      sampled: whether tokens are drawn; otherwise the largest logit is taken.
      nucleus: whether ``top_p`` is below 1.
    """

    temperature: jax.Array
    top_p: jax.Array
    key: jax.Array
    sampled: bool = dataclasses.field(metadata=dict(static=True))
    nucleus: bool = dataclasses.field(metadata=dict(static=True))

    def __call__(self, logits_BxV: jax.Array, number: jax.Array) -> jax.Array:
        """The ids of the new tokens of this number, int32 [B]."""
        if not self.sampled:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        logits_BxV = logits_BxV / self.temperature
        if self.nucleus:
            logits_BxV = jnp.where(_nucleus(logits_BxV, self.top_p), logits_BxV, -jnp.inf)
        rows_B = jnp.arange(logits_BxV.shape[0])
        keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(self.key, row), number))(rows_B)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)


def _nucleus(logits_BxV: jax.Array, top_p: jax.Array) -> jax.Array:
    """True at the most probable tokens, as few as reach ``top_p`` together, at least one (Holtzman et al., 2020)."""
    order_BxV = jnp.argsort(-logits_BxV, axis=-1)
    shares_BxV = jnp.take_along_axis(jax.nn.softmax(logits_BxV, axis=-1), order_BxV, axis=-1)
    more_probable_BxV = jnp.cumsum(shares_BxV, axis=-1) - shares_BxV
    kept_BxV = (more_probable_BxV < top_p).at[:, 0].set(True)
    return jnp.put_along_axis(jnp.zeros_like(kept_BxV), order_BxV, kept_BxV, axis=-1, inplace=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A batch that is being continued.

    Attributes:
      cache: keys and values of all tokens but the newest.
      new_BxN: int32 new ids; those from ``count`` on are not made yet.
      count: int32, how many there are.
      done_B: whether the prompt's text has ended.
      finite_B: whether all logits so far were finite.
    """

    cache: KVCache
    new_BxN: jax.Array
    count: jax.Array
    done_B: jax.Array
    finite_B: jax.Array

    def add(self, cache: KVCache, logits_BxV: jax.Array, sampling: SamplingParams, end_ids_E: jax.Array) -> "State":
        """The state after the next token was chosen by the logits; ``end_ids_E`` are the ids that end a text."""
        next_B = sampling(logits_BxV, self.count)
        return State(
            cache,
            lax.dynamic_update_slice(self.new_BxN, next_B[:, None], (0, self.count)),
            self.count + 1,
            self.done_B | (next_B[:, None] == end_ids_E[None, :]).any(axis=1),
            self.finite_B & jnp.isfinite(logits_BxV.max(axis=-1)),
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    config: DecoderConfig,
    room: int,
    params: Params,
    ids_BxT: jax.Array,
    pad_B: jax.Array,
    end_ids_E: jax.Array,
    edits: Edits,
    sampling: SamplingParams,
) -> State:
    """Reads the prompts and chooses the first new token of each.

    Args:
      room: most new tokens (static).
      ids_BxT: int32 prompts, padded on the left.
      pad_B: int32 number of padding tokens of each.
      end_ids_E: ids that end a text.
    """
    batch, length = ids_BxT.shape
    cache = init_cache(config, batch, length, params["embed_VxD"].dtype, pad_B)
    position_BxT = jnp.maximum(jnp.arange(length)[None, :] - pad_B[:, None], -1)
    logits_BxV, cache = _run(config, params, ids_BxT, ForwardPass(position_BxT, length - pad_B), cache, edits)
    more = [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]
    stores = {name: jnp.pad(getattr(cache, name), more) for name in ("k_LxBxSxNxK", "v_LxBxSxNxK")}
    none_B = jnp.zeros(batch, bool)
    state = State(cache, jnp.zeros((batch, room), jnp.int32), jnp.zeros((), jnp.int32), none_B, ~none_B)
    return state.add(dataclasses.replace(cache, **stores), logits_BxV, sampling, end_ids_E)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    config: DecoderConfig,
    params: Params,
    state: State,
    limit: jax.Array,
    end_ids_E: jax.Array,
    edits: Edits,
    sampling: SamplingParams,
) -> State:
    """Makes new tokens until there are ``limit`` of them or all texts have ended with one of ``end_ids_E``.

    The state that goes in is used up.
    """
    batch = state.done_B.shape[0]

    def step(state: State) -> State:
        newest_Bx1 = lax.dynamic_slice(state.new_BxN, (0, state.count - 1), (batch, 1))
        position_Bx1 = state.cache.positions_BxT(1)
        run = ForwardPass(position_Bx1, position_Bx1[:, 0] - (state.count - 1))
        logits_BxV, cache = _run(config, params, newest_Bx1, run, state.cache, edits)
        return state.add(cache, logits_BxV, sampling, end_ids_E)

    return lax.while_loop(lambda state: (state.count < limit) & ~state.done_B.all(), step, state)


def _run(
    config: DecoderConfig, params: Params, ids_BxT: jax.Array, run: ForwardPass, cache: KVCache, edits: Edits
) -> tuple[jax.Array, KVCache]:
    """Runs new tokens; gives the logits [B, V] after the last of them."""
    new = ids_BxT.shape[1]
    x_BxTxD = decoder.embed(config, params, ids_BxT, cache.positions_BxT(new))
    hooks, attention = (run.hook(edits), edited_layers(edits)), cache.attention(config, new)
    ran = run_layers(config, params, x_BxTxD, 0, config.n_layers, *hooks, attention=attention)
    return decoder.unembed(config, params, ran.x[:, -1:])[:, 0], cache.grown(ran.carried, new)


@functools.partial(jax.jit, static_argnums=0)
def recompute(
    config: DecoderConfig,
    params: Params,
    ids_BxT: jax.Array,
    lengths_B: jax.Array,
    number: jax.Array,
    edits: Edits,
    sampling: SamplingParams,
) -> tuple[jax.Array, jax.Array]:
    """The next token by a whole forward pass, without a cache.

    Args:
      ids_BxT: int32 prompts with all tokens so far, padded on the right.
      lengths_B: int32 number of those tokens.
      number: int32 number of the new token, from 0.

    Returns:
      New ids int32 [B], and whether the logits were finite [B].
    """
    mask_BxT = jnp.arange(ids_BxT.shape[1])[None, :] < lengths_B[:, None]
    x_BxTxD = decoder.embed(config, params, ids_BxT)
    run = dataclasses.replace(ForwardPass.over(mask_BxT), prompt_lengths_B=lengths_B - number)
    x_BxTxD = run_layers(config, params, x_BxTxD, 0, config.n_layers, run.hook(edits), edited_layers(edits)).x
    last_Bx1xD = jnp.take_along_axis(x_BxTxD, (lengths_B - 1)[:, None, None], axis=1)
    logits_BxV = decoder.unembed(config, params, last_Bx1xD)[:, 0]
    return sampling(logits_BxV, number), jnp.isfinite(logits_BxV.max(axis=-1))

"""Decoding with a key-value cache, as jitted programs.

1. ``prefill`` runs the prompts, fills the cache and chooses the first new token of each.
2. ``decode`` runs the newest token of every prompt against the cache, one step after another.
3. ``decode_in_chunks`` drives the two from the host and yields new ids, so that stop strings can be looked for.

A cache has S slots per prompt. Prompts are padded on the left, so that all of them end at the same slot and every new
token of the batch goes to the next one: slot s of prompt b holds the token at position ``s - pad_B[b]``, and the first
``pad_B[b]`` slots hold padding, which no token attends to.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import QKV, Attend, AttentionSpec, CausalMask, Layer, tables_by_layer
from saejax.models.config import DecoderConfig
from saejax.models.decoder import Params, run_layers
from saejax.models.edits import Edit, ForwardPass, edited_layers
from saejax.models.layers import Taps
from saejax.models.lengths import round_length
from saejax.models.tokens import Tokens
from saejax.parallel.mesh import by_row

Edits = tuple[Edit, ...]
_COLDEST = 1e-30  # least temperature above 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in every layer."""

    k_LxBxSxNxK: jax.Array  #: keys, after the rotary embedding
    v_LxBxSxNxK: jax.Array  #: values
    pad_B: jax.Array  #: int32 number of slots, from the left, that hold padding
    length: jax.Array  #: int32 number of slots that are written, the same for all prompts

    def positions_BxT(self, new: int) -> jax.Array:
        """Return the positions of the next ``new`` tokens, int32 [B, T]; padding is at position 0."""
        slots_T = self.length + jnp.arange(new)
        # Padding gets an index that exists, as learned positions have none below 0.
        return jnp.maximum(slots_T[None, :] - self.pad_B[:, None], 0)

    def attention(self, config: DecoderConfig, new: int) -> AttentionSpec:
        """Return the attention pattern of the next ``new`` tokens over themselves and the cached ones.

        The caller makes sure that the cache has free slots for them. Values at padding are meaningless. What a run
        carries out of the last layer are the extended keys and values; see ``extend``.
        """

        def function(
            attend: Attend, layer: Layer, qkv: QKV, stores: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            """Write new keys and values into the cache, and attend to all that it holds."""
            start = (layer, 0, self.length, 0, 0)
            k_store, v_store = (
                lax.dynamic_update_slice(store, value[None].astype(store.dtype), start)
                for store, value in zip(stores, qkv[1:], strict=True)
            )
            k, v = (lax.dynamic_index_in_dim(store, layer, keepdims=False) for store in (k_store, v_store))
            return attend(qkv[0], k, v), (k_store, v_store)

        mask = functools.partial(CausalMask, first=self.length, pad_B=self.pad_B)
        return AttentionSpec(
            tables_by_layer(config, self.positions_BxT(new), mask), function, (self.k_LxBxSxNxK, self.v_LxBxSxNxK)
        )

    def extend(self, stores: Any, new: int) -> "KVCache":
        """Return the cache with ``new`` more tokens, whose run carried these ``stores`` out of the last layer."""
        k_LxBxSxNxK, v_LxBxSxNxK = stores
        return KVCache(k_LxBxSxNxK, v_LxBxSxNxK, self.pad_B, self.length + new)


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: DTypeLike, pad_B: jax.Array) -> KVCache:
    """Return an empty cache of ``batch`` prompts with ``slots`` tokens in a dtype, of which ``pad`` are padding."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.d_head)
    return KVCache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.asarray(pad_B, jnp.int32), jnp.zeros((), jnp.int32)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Parameters of the choice of the next token. Static: ``sampled``, ``nucleus``."""

    temperature: jax.Array  #: fp32 scalar by which the logits are divided
    #: fp32 scalar: sampling is from the smallest set of most probable tokens with this total probability.
    top_p: jax.Array
    key: jax.Array  #: random key; token n of prompt b has its own, folded in
    #: whether tokens are sampled; otherwise the largest logit is taken.
    sampled: bool = dataclasses.field(metadata=dict(static=True))
    nucleus: bool = dataclasses.field(metadata=dict(static=True))  #: whether ``top_p`` is below 1

    def __call__(self, logits_BxV: jax.Array, step: jax.Array) -> jax.Array:
        """Return the ids of new token number ``step`` of every prompt, int32 [B]."""
        if not self.sampled:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        logits_BxV = logits_BxV / self.temperature
        if self.nucleus:
            logits_BxV = jnp.where(_nucleus(logits_BxV, self.top_p), logits_BxV, -jnp.inf)
        # A key for each prompt and token: draws depend neither on the batch's size nor on the chunks of decoding.
        rows_B = jnp.arange(logits_BxV.shape[0])
        keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(self.key, row), step))(rows_B)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)


def sampling_params(temperature: float, top_p: float, seed: int) -> SamplingParams:
    """Return sampling parameters with the key of a seed.

    Raises:
      UserError: the temperature is below 0 (greedy decoding) or not finite, ``top_p`` is not in (0, 1], or the seed is
        no whole number.
    """
    if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature!r}: expected a number of at least 0")
    if not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p!r}: expected a number above 0 and at most 1")
    if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise UserError(f"seed is {seed!r}: expected a whole number of at most 64 bits")
    sampled = temperature > 0
    key = jax.random.key(int(seed))
    # Divided by less, logits are infinite; this close to 0 the most probable token is taken anyway.
    return SamplingParams(
        jnp.float32(max(temperature, _COLDEST)), jnp.float32(top_p), key, sampled, sampled and top_p < 1
    )


def _nucleus(logits_BxV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return True at the fewest most probable tokens that reach ``top_p``, at least one (Holtzman et al., 2020)."""
    order_BxV = jnp.argsort(-logits_BxV, axis=-1)
    probs_BxV = jnp.take_along_axis(jax.nn.softmax(logits_BxV, axis=-1), order_BxV, axis=-1)
    # The probability before each token: the one that crosses ``top_p`` is kept.
    more_probable_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV
    kept_BxV = (more_probable_BxV < top_p).at[:, 0].set(True)
    return jnp.put_along_axis(jnp.zeros_like(kept_BxV), order_BxV, kept_BxV, axis=-1, inplace=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch during decoding."""

    cache: KVCache  #: keys and values of all tokens but the newest
    new_BxN: jax.Array  #: int32 new ids; columns from ``count`` on are not made yet
    count: jax.Array  #: int32 number of new tokens so far
    done_B: jax.Array  #: whether each prompt's text has ended
    finite_B: jax.Array  #: whether all logits so far were finite

    def add(
        self, cache: KVCache, logits_BxV: jax.Array, sampling: SamplingParams, end_ids_E: jax.Array
    ) -> "DecodeState":
        """Return the state after choosing the next tokens by the logits; ``end_ids`` are the ids that end a text."""
        next_B = sampling(logits_BxV, self.count)
        return DecodeState(
            cache,
            lax.dynamic_update_slice(self.new_BxN, next_B[:, None], (0, self.count)),
            self.count + 1,
            self.done_B | (next_B[:, None] == end_ids_E[None, :]).any(axis=1),
            # The largest tells it: NaN goes through a maximum.
            self.finite_B & jnp.isfinite(logits_BxV.max(axis=-1)),
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    config: DecoderConfig,
    max_new: int,
    params: Params,
    ids_BxT: jax.Array,
    pad_B: jax.Array,
    end_ids_E: jax.Array,
    edits: Edits,
    sampling: SamplingParams,
) -> DecodeState:
    """Run the prompts and choose the first new token of each.

    Args:
      config: the decoder (static).
      max_new: number of new tokens for which the state has slots (static).
      params: parameters of ``parameters.parameter_table``.
      ids_BxT: int32 prompts, padded on the left.
      pad_B: int32 number of padding tokens of each.
      end_ids_E: ids that end a text.
      edits: made at the prompts' positions.
      sampling: parameters of the choice.
    """
    batch, length = ids_BxT.shape
    # The dtype of the parameters, of which every family has an embedding.
    cache = init_cache(config, batch, length, params["embed_VxD"].dtype, pad_B)
    position_BxT = jnp.maximum(jnp.arange(length)[None, :] - pad_B[:, None], -1)
    logits_BxV, cache = _next_logits(config, params, ids_BxT, ForwardPass(position_BxT, length - pad_B), cache, edits)
    # Slots for new tokens are added only now, so that attention over the prompts does not read empty ones.
    padding = [(0, 0), (0, 0), (0, max_new), (0, 0), (0, 0)]
    stores = {name: jnp.pad(getattr(cache, name), padding) for name in ("k_LxBxSxNxK", "v_LxBxSxNxK")}
    none_B = jnp.zeros(batch, bool)
    state = DecodeState(cache, jnp.zeros((batch, max_new), jnp.int32), jnp.zeros((), jnp.int32), none_B, ~none_B)
    return state.add(dataclasses.replace(cache, **stores), logits_BxV, sampling, end_ids_E)


# Donated: the cache, by far the largest array, is extended in place.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    config: DecoderConfig,
    params: Params,
    state: DecodeState,
    limit: jax.Array,
    end_ids_E: jax.Array,
    edits: Edits,
    sampling: SamplingParams,
) -> DecodeState:
    """Make new tokens until there are ``limit`` of them or every text has ended.

    Args:
      config: the decoder (static).
      params: parameters of ``parameters.parameter_table``.
      state: from ``prefill`` or an earlier call; donated.
      limit: int32 number of new tokens.
      end_ids_E: ids that end a text.
      edits: made at the positions of new tokens as they are read.
      sampling: how tokens are chosen.
    """
    batch = state.done_B.shape[0]

    def step(state: DecodeState) -> DecodeState:
        """Make one new token of every prompt."""
        newest_Bx1 = lax.dynamic_slice(state.new_BxN, (0, state.count - 1), (batch, 1))
        position_Bx1 = state.cache.positions_BxT(1)
        # The prompt's length, found from the position, as the cache counts padding and new tokens together.
        run = ForwardPass(position_Bx1, position_Bx1[:, 0] - (state.count - 1))
        logits_BxV, cache = _next_logits(config, params, newest_Bx1, run, state.cache, edits)
        return state.add(cache, logits_BxV, sampling, end_ids_E)

    # A while loop ends with the last text; a scan would always run to the limit.
    return lax.while_loop(lambda state: (state.count < limit) & ~state.done_B.all(), step, state)


def _next_logits(
    config: DecoderConfig, params: Params, ids_BxT: jax.Array, run: ForwardPass, cache: KVCache, edits: Edits
) -> tuple[jax.Array, KVCache]:
    """Run new tokens; return the logits [B, V] after the last of them and the extended cache."""
    new = ids_BxT.shape[1]
    x_BxTxD = decoder.embed(config, params, ids_BxT, cache.positions_BxT(new))
    taps, attention = Taps(run.hook(edits), edited_layers(edits), inner_sites=True), cache.attention(config, new)
    output = run_layers(config, params, x_BxTxD, 0, config.n_layers, taps, attention=attention)
    # The last position alone: with a large vocabulary, logits of whole prompts would take gigabytes.
    return decoder.unembed(config, params, output.x[:, -1:])[:, 0], cache.extend(output.carried, new)


def decoding_length(length: int) -> int:
    """Return the number of slots for prompts, or for new tokens, of this length: coarse, as decoding compiles long."""
    return round_length(length, multiple=32)


def decode_in_chunks(
    config: DecoderConfig,
    params: Params,
    mesh: Mesh,
    tokens: Tokens,
    max_new_tokens: int,
    sampling: SamplingParams,
    end_ids: Sequence[int],
    edits: Edits,
    chunk: int,
) -> Iterator[np.ndarray]:
    """Yield the new ids of all prompts, int32 [B, n], ``chunk`` tokens at a time.

    Ids after the end of a prompt's text are meaningless.

    Args:
      config: the decoder.
      params: parameters of ``parameters.parameter_table``.
      mesh: the devices; prompts are split over its axes ``member`` and ``data``.
      tokens: the prompts, padded on the right.
      max_new_tokens: number of new tokens.
      sampling: how tokens are chosen.
      end_ids: ids that end a text.
      edits: with values by position for ``decoding_length(T)`` tokens.
      chunk: number of tokens between two looks of the host.

    Raises:
      UserError: logits are not finite.
    """

    def place(array: np.ndarray) -> jax.Array:
        """Put an array on the devices, its rows split over ``member`` and ``data``."""
        return by_row(mesh, array)[0]

    ids_BxT, pad_B = tokens.pad_left(decoding_length(int(tokens.lengths_B.max())))
    end_ids_E = np.array(end_ids or [-1], np.int32)  # programs take no empty arrays; no token has the id -1
    max_new = decoding_length(max_new_tokens)
    state = prefill(config, max_new, params, place(ids_BxT), place(pad_B), end_ids_E, edits, sampling)
    for start in range(0, max_new_tokens, chunk):
        stop = min(start + chunk, max_new_tokens)
        state = decode(config, params, state, np.int32(stop), end_ids_E, edits, sampling)
        # A copy: the next call takes over the state's memory.
        new_BxN, finite_B = np.array(state.new_BxN)[:, start:stop], np.array(state.finite_B)
        check_finite(finite_B)
        yield new_BxN


def check_finite(finite_B: np.ndarray) -> None:
    """Raise a ``UserError`` unless the logits after all prompts were finite."""
    if not finite_B.all():
        raise UserError(
            f"the logits after prompt {int(np.argmin(finite_B))} of {len(finite_B)} are NaN or infinite: expected "
            "finite numbers; check the model's weights and the edits, or use --model.dtype=float32"
        )

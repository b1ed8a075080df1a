"""Running the decoder on some tokens of a text, with the keys and values of earlier tokens at hand.

Two uses: decoding, where each new token is computed once (``run_cached``, whose ``Cache`` grows), and edits, where all
that comes before a prompt's first changed token stays as it was (``run_tree``, ``run_tree_from``, beside a ``Past``).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.attention import Reach, cached_reaches, full_reaches, mix, tree_reaches
from saejax.models.cache import Cache
from saejax.models.config import DecoderConfig
from saejax.models.decoder import Hook, LayerHook, Params, block, call_hook, no_hook


class Past(NamedTuple):
    """Keys, after the rotary embedding, and values of whole prompts (P of S tokens) in L consecutive layers."""

    k_LxPxSxNxK: jax.Array
    v_LxPxSxNxK: jax.Array


def run_recorded(
    config: DecoderConfig,
    params: Params,
    x_BxTxD: jax.Array,
    start: int,
    stop: int,
    hook: Hook | None = None,
    kinds: Collection[str] = (),
) -> tuple[jax.Array, Past, dict[str, jax.Array]]:
    """``decoder.run_layers`` that keeps all keys and values.

    Args:
      hook: as there, called in layer ``start`` alone.
      kinds: of sites whose values are kept.

    Returns:
      The stream leaving layer ``stop - 1``, [B, T, D], the past of layers ``start`` to ``stop - 1``, and for each of
      ``kinds`` the values there, [stop - start, B, T, D].
    """
    reaches = full_reaches(config, x_BxTxD.shape[-2])
    Kept = tuple[Past, dict[str, jax.Array]]

    def step(x_BxTxD: jax.Array, layer: int | jax.Array, bound: LayerHook) -> tuple[jax.Array, Kept]:
        kept: list[Past] = []
        seen: dict[str, jax.Array] = {}

        def keep(q: jax.Array, k: jax.Array, v: jax.Array, reach: Reach) -> jax.Array:
            kept.append(Past(k, v))
            return mix(config, q, k, v, reach)

        def look(kind: str, value_BxTxD: jax.Array) -> jax.Array:
            value_BxTxD = bound(kind, value_BxTxD)
            if kind in kinds:
                seen[kind] = value_BxTxD
            return value_BxTxD

        return block(config, params, layer, x_BxTxD, reaches, look, keep), (kept[0], seen)

    def scan(x_BxTxD: jax.Array, start: int) -> tuple[jax.Array, Kept]:
        return lax.scan(lambda x, layer: step(x, layer, no_hook), x_BxTxD, jnp.arange(start, stop))

    if hook is None:
        x_BxTxD, kept = scan(x_BxTxD, start)
        return x_BxTxD, *kept
    x_BxTxD, entered = step(x_BxTxD, start, functools.partial(call_hook, hook, start))
    x_BxTxD, kept = scan(x_BxTxD, start + 1)
    return x_BxTxD, *jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), entered, kept)


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
    def unshared(cls, place_R: jax.Array, first_R: jax.Array, length: int, shards: int) -> "Tree":
        """Rows of which each has ``length`` tokens of its own, in order."""
        count = len(place_R) // shards
        token_RxT = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
        row_N, column_N = jnp.divmod(token_RxT.reshape(-1), length)
        shared = (jnp.broadcast_to(array[None], (shards, *array.shape)) for array in (token_RxT, row_N, column_N))
        return cls(place_R.reshape(shards, count), first_R.reshape(shards, count), *shared)

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


def run_tree(
    config: DecoderConfig,
    params: Params,
    x_SxNxD: jax.Array,
    start: int,
    past: Past,
    tree: Tree,
    hook: Hook | None = None,
) -> jax.Array:
    """Runs the layers from ``start`` to the last on the tokens of edited prompts whose earlier tokens are known.

    All but attention acts on each token once, however many rows share it.

    Args:
      x_SxNxD: the stream entering layer ``start``.
      past: of the same layers.
      tree: which tokens follow which.
      hook: as in ``decoder.run_layers``, called in layer ``start`` alone.

    Returns:
      The stream leaving the last layer, [S, N, D]; the same as that of full runs of the rows in which nothing before
      their first tokens is changed.
    """
    step = _grown(config, params, past, tree, start)
    if hook is not None:
        x_SxNxD = step(x_SxNxD, start, functools.partial(call_hook, hook, start))
    first = start + (hook is not None)
    if first == config.n_layers:
        return x_SxNxD
    return lax.scan(lambda x, layer: (step(x, layer, no_hook), None), x_SxNxD, jnp.arange(first, config.n_layers))[0]


def run_tree_from(
    config: DecoderConfig,
    params: Params,
    x_SxNxD: jax.Array,
    start: jax.Array,
    past: Past,
    tree: Tree,
    hook: Callable[[jax.Array, str, jax.Array], jax.Array],
) -> jax.Array:
    """``run_tree`` from a layer that is known only when the program runs: one program for all of them.

    Args:
      start: int32 []; the number of layers for none of them.
      past: of all layers.
      hook: given the layer, the kind of site and its value [S, N, D] at every site of every layer; the model goes on
        with what it returns.
    """
    step = _grown(config, params, past, tree, 0)

    def body(layer: jax.Array, x_SxNxD: jax.Array) -> jax.Array:
        return step(x_SxNxD, layer, functools.partial(hook, layer))

    return lax.fori_loop(start, config.n_layers, body, x_SxNxD)


def _grown(
    config: DecoderConfig, params: Params, past: Past, tree: Tree, below: int
) -> Callable[[jax.Array, int | jax.Array, LayerHook], jax.Array]:
    """One layer on the tokens of a tree; the past's first layer is ``below``."""
    known, new = past.k_LxPxSxNxK.shape[2], tree.token_SxRxT.shape[2]
    reaches = tree_reaches(config, tree.position_SxN, tree.first_SxR, new, known)

    def step(x_SxNxD: jax.Array, layer: int | jax.Array, bound: LayerHook) -> jax.Array:
        k_known, v_known = (lax.dynamic_index_in_dim(part, layer - below, keepdims=False) for part in past)

        def meet(q: jax.Array, k: jax.Array, v: jax.Array, reach: Reach) -> jax.Array:
            q, k, v = (jax.vmap(lambda part, token: part[token])(part, tree.token_SxRxT) for part in (q, k, v))
            k = jnp.concatenate([k_known[tree.place_SxR], k], axis=2)
            v = jnp.concatenate([v_known[tree.place_SxR], v], axis=2)
            mixed_SxRxTxHxK = mix(config, q, k, v, reach)
            return jax.vmap(lambda part, row, column: part[row, column])(mixed_SxRxTxHxK, tree.row_SxN, tree.column_SxN)

        return block(config, params, layer, x_SxNxD, reaches, bound, meet)

    return step


def run_cached(
    config: DecoderConfig,
    params: Params,
    x_BxTxD: jax.Array,
    cache: Cache,
    hook: Hook | None = None,
    hook_layers: Collection[int] = (),
) -> tuple[jax.Array, Cache]:
    """Runs all layers on T new tokens, which attend to themselves and to the tokens in the cache.

    T is the length of the (left padded) prompts at first and 1 while decoding. The caller sees to it that the cache
    has room for them.

    Args:
      x_BxTxD: ``embed`` of the new tokens, at the positions ``cache.positions_BxT(T)``.
      cache: what went before.
      hook, hook_layers: as in ``run_layers``.

    Returns:
      The stream leaving the last layer at the new tokens, [B, T, D], and the cache with these tokens in it. What
      stands at padding means nothing.
    """
    new = x_BxTxD.shape[1]
    reaches = cached_reaches(config, cache, new)
    Carry = tuple[jax.Array, jax.Array, jax.Array]

    def step(carry: Carry, layer: int | jax.Array, bound: LayerHook) -> Carry:
        x_BxTxD, *stores = carry

        def meet(q: jax.Array, k: jax.Array, v: jax.Array, reach: Reach) -> jax.Array:
            for index, (store, value) in enumerate(zip(stores, (k, v), strict=True)):
                start = (layer, 0, cache.length, 0, 0)
                stores[index] = lax.dynamic_update_slice(store, value[None].astype(store.dtype), start)
            k, v = (lax.dynamic_index_in_dim(store, layer, keepdims=False) for store in stores)
            return mix(config, q, k, v, reach)

        x_BxTxD = block(config, params, layer, x_BxTxD, reaches, bound, meet)
        return x_BxTxD, *stores

    def scan(carry: Carry, start: int, stop: int) -> Carry:
        return lax.scan(lambda c, layer: (step(c, layer, no_hook), None), carry, jnp.arange(start, stop))[0]

    carry, start = (x_BxTxD, cache.k_LxBxSxNxK, cache.v_LxBxSxNxK), 0
    if hook is not None:
        for layer in sorted(set(hook_layers) & set(range(config.n_layers))):
            carry = step(scan(carry, start, layer), layer, functools.partial(call_hook, hook, layer))
            start = layer + 1
    x_BxTxD, k, v = scan(carry, start, config.n_layers)
    return x_BxTxD, dataclasses.replace(cache, k_LxBxSxNxK=k, v_LxBxSxNxK=v, length=cache.length + new)

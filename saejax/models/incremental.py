"""Running the decoder on some tokens of a text, with the keys and values of earlier tokens at hand.

Two uses: decoding, where each new token is computed once (``run_cached``, whose ``Cache`` grows), and edits, where all
that comes before a prompt's first changed token stays as it was (``run_after`` and ``run_from``, whose ``Past`` holds
whole prompts).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.attention import cached_reaches, full_reaches, reaches_after
from saejax.models.cache import Cache
from saejax.models.config import DecoderConfig
from saejax.models.decoder import Hook, LayerHook, Params, block, call_hook, no_hook


class Past(NamedTuple):
    """Keys, after the rotary embedding, and values of whole prompts (P of S tokens) in L consecutive layers."""

    k_LxPxSxNxK: jax.Array
    v_LxPxSxNxK: jax.Array


def run_recorded(
    config: DecoderConfig, params: Params, x_BxTxD: jax.Array, start: int, stop: int, kinds: Collection[str] = ()
) -> tuple[jax.Array, Past, dict[str, jax.Array]]:
    """``decoder.run_layers`` that keeps all keys and values.

    Returns:
      The stream leaving layer ``stop - 1``, [B, T, D], the past of layers ``start`` to ``stop - 1``, and for each of
      ``kinds`` of site its values there, [stop - start, B, T, D].
    """
    reaches = full_reaches(config, x_BxTxD.shape[-2])

    def body(x_BxTxD: jax.Array, layer: jax.Array) -> tuple[jax.Array, tuple[Past, dict[str, jax.Array]]]:
        kept: list[Past] = []
        seen: dict[str, jax.Array] = {}

        def keep(*own_BxTxNxK: jax.Array) -> tuple[jax.Array, ...]:
            kept.append(Past(*own_BxTxNxK))
            return own_BxTxNxK

        def look(kind: str, value_BxTxD: jax.Array) -> jax.Array:
            if kind in kinds:
                seen[kind] = value_BxTxD
            return value_BxTxD

        return block(config, params, layer, x_BxTxD, reaches, look, keep), (kept[0], seen)

    x_BxTxD, (past, seen) = lax.scan(body, x_BxTxD, jnp.arange(start, stop))
    return x_BxTxD, past, seen


def run_after(
    config: DecoderConfig,
    params: Params,
    x_RxTxD: jax.Array,
    start: int,
    past: Past,
    place_R: jax.Array,
    first_R: jax.Array,
    hook: Hook | None = None,
) -> jax.Array:
    """Runs the layers from ``start`` to the last on T consecutive tokens of prompts whose earlier tokens are known.

    Args:
      x_RxTxD: the stream entering layer ``start``.
      past: of the same layers.
      place_R: which of the past's prompts each row continues.
      first_R: position of each row's first token.
      hook: as in ``decoder.run_layers``, called in layer ``start`` alone.

    Returns:
      The stream leaving the last layer, [R, T, D]; the same as that of a full run in which nothing before the first
      tokens is changed.
    """
    step = _continued(config, params, x_RxTxD.shape[1], start, past, place_R, first_R)
    if hook is not None:
        x_RxTxD = step(x_RxTxD, start, functools.partial(call_hook, hook, start))
    first = start + (hook is not None)
    if first == config.n_layers:
        return x_RxTxD
    return lax.scan(lambda x, layer: (step(x, layer, no_hook), None), x_RxTxD, jnp.arange(first, config.n_layers))[0]


def run_from(
    config: DecoderConfig,
    params: Params,
    x_RxTxD: jax.Array,
    start: jax.Array,
    past: Past,
    place_R: jax.Array,
    first_R: jax.Array,
    hook: Callable[[jax.Array, str, jax.Array], jax.Array],
) -> jax.Array:
    """``run_after`` from a layer that is known only when the program runs: one program for all of them.

    Args:
      start: int32 []; the number of layers for none of them.
      past: of all layers.
      hook: given the layer, the kind of site and its value [R, T, D] at every site of every layer; the model goes on
        with what it returns.
    """
    step = _continued(config, params, x_RxTxD.shape[1], 0, past, place_R, first_R)

    def body(layer: jax.Array, x_RxTxD: jax.Array) -> jax.Array:
        return step(x_RxTxD, layer, functools.partial(hook, layer))

    return lax.fori_loop(start, config.n_layers, body, x_RxTxD)


def _continued(
    config: DecoderConfig, params: Params, new: int, below: int, past: Past, place_R: jax.Array, first_R: jax.Array
) -> Callable[[jax.Array, int | jax.Array, LayerHook], jax.Array]:
    """One layer on ``new`` tokens of prompts whose earlier tokens are known; the past's first layer is ``below``."""
    reaches = reaches_after(config, first_R, new, past.k_LxPxSxNxK.shape[2])

    def step(x_RxTxD: jax.Array, layer: int | jax.Array, bound: LayerHook) -> jax.Array:
        def extend(*own_RxTxNxK: jax.Array) -> list[jax.Array]:
            both = zip(past, own_RxTxNxK, strict=True)
            return [jnp.concatenate([_rows(known, layer - below, place_R), own], axis=1) for known, own in both]

        return block(config, params, layer, x_RxTxD, reaches, bound, extend)

    return step


def _rows(known_LxPxSxNxK: jax.Array, layer: int | jax.Array, place_R: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(known_LxPxSxNxK, layer, keepdims=False)[place_R]


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

        def extend(*new_BxTxNxK: jax.Array) -> list[jax.Array]:
            for index, (store, value) in enumerate(zip(stores, new_BxTxNxK, strict=True)):
                start = (layer, 0, cache.length, 0, 0)
                stores[index] = lax.dynamic_update_slice(store, value[None].astype(store.dtype), start)
            return [lax.dynamic_index_in_dim(store, layer, keepdims=False) for store in stores]

        x_BxTxD = block(config, params, layer, x_BxTxD, reaches, bound, extend)
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

"""The one way to run layers of a decoder: some or all, with sites changed and collected, however its tokens attend."""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.models.attention import Layer, RunAttention, attend
from saejax.models.attention_tables import AttentionTables, whole_prompts
from saejax.models.config import DecoderConfig
from saejax.models.decoder import Params, run_layer
from saejax.models.rules import GRADIENT, RunRules

Hook = Callable[[str, Layer, jax.Array], jax.Array]
KEYS, VALUES = "keys", "values"  # what can be collected beside the kinds of site


class LayersRun(NamedTuple):
    """What a run of layers gave.

    Attributes:
      x: the stream leaving the last of them, [B, T, D].
      collected: for each kind that was asked for its values in all layers of the run, [L, B, T, D]; of keys (after the
        rotary embedding) and values [L, B, T, N, K].
      carried: what the attention carried on.
    """

    x: jax.Array
    collected: dict[str, jax.Array]
    carried: Any


def run_layers(
    config: DecoderConfig,
    params: Params,
    x_xTxD: jax.Array,
    start: int | jax.Array,
    stop: int,
    hook: Hook | None = None,
    hook_layers: Collection[int] | None = (),
    *,
    rules: RunRules = GRADIENT,
    attention: RunAttention | None = None,
    collect: Collection[str] = (),
    before_hook: bool = False,
) -> LayersRun:
    """Runs layers ``start`` to ``stop - 1`` on the residual stream that enters layer ``start``.

    So ``run_layers(config, params, x, L + 1, config.n_layers)`` is the rest of the model after ``resid_post.L``. Layers
    run in one loop that indexes the stacked parameters, so that the time to compile does not grow with their number.

    Args:
      x_xTxD: the stream entering layer ``start``.
      start: if it is an array (int32 []), one program runs from any layer; then nothing is collected, and the run
        cannot be differentiated backwards.
      hook: called while tracing, at every site of the layers in ``hook_layers``, with its kind, its layer's number and
        its value [B, T, D]; the model goes on with what it returns.
      hook_layers: these layers are unrolled, so that the hook knows their numbers. None: the hook is called in every
        layer, in the loop, where the layer's number is an array.
      rules: what differentiation goes by.
      attention: how tokens attend; None: to one another, at positions 0 to T - 1.
      collect: kinds of site, ``KEYS`` and ``VALUES``.
      before_hook: collect the values of sites as they were before the hook changed them.
    """
    attention = attention or RunAttention(whole_prompts(config, x_xTxD.shape[-2]))
    step = functools.partial(_step, config, rules, params, attention, hook, collect, before_hook)
    body = functools.partial(step, hook_layers is None)
    carry = x_xTxD, attention.carried
    if not isinstance(start, int):
        x, carried = lax.fori_loop(start, stop, lambda layer, carry: body(carry, layer)[0], carry)
        return LayersRun(x, {}, carried)
    # For a gradient, matrix products are kept from the forward pass and the rest is computed again (all of it with
    # remat); otherwise a copy of every layer's parameters would be kept too.
    loop = jax.checkpoint(body, policy=rules.kept, prevent_cse=False)
    parts: list[dict[str, jax.Array]] = []
    for layer in [*sorted(set(hook_layers or ()) & set(range(start, stop))), stop]:
        if start < layer or (collect and not parts and layer == stop):  # of no layers, arrays of none are collected
            carry, found = lax.scan(loop, carry, jnp.arange(start, layer))
            parts.append(found)
        if layer < stop:
            carry, found = step(True, carry, layer)
            parts.append({name: value[None] for name, value in found.items()})
        start = layer + 1
    collected = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if len(parts) > 1 else dict(*parts)
    return LayersRun(carry[0], collected, carry[1])


def _step(
    config: DecoderConfig,
    rules: RunRules,
    params: Params,
    attention: RunAttention,
    hook: Hook | None,
    collect: Collection[str],
    before_hook: bool,
    hooked: bool,
    carry: tuple[jax.Array, Any],
    layer: Layer,
) -> tuple[tuple[jax.Array, Any], dict[str, jax.Array]]:
    """One layer: the stream leaving it and what the attention carries on, and what is collected there."""
    (x, carried), found = carry, {}

    def at_site(kind: str, value: jax.Array) -> jax.Array:
        new = hook(kind, layer, value) if hook and hooked else value
        if kind in collect:
            found[kind] = value if before_hook else new
        return new

    def attended(q: jax.Array, k: jax.Array, v: jax.Array, tables: AttentionTables) -> jax.Array:
        nonlocal carried
        found.update({name: part for name, part in ((KEYS, k), (VALUES, v)) if name in collect})
        plain = functools.partial(attend, config, rules, tables=tables)
        if attention.function is None:
            return plain(q, k, v)
        out, carried = attention.function(plain, layer, (q, k, v), carried)
        return out

    x = run_layer(config, rules, params, layer, x, attention.tables, at_site, attended)
    return (x, carried), found

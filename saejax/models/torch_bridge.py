"""The functions of ``decoder`` for a model that runs in PyTorch: JAX functions, by callbacks.

A *segment* is layers ``start`` to ``stop - 1``, run on the residual stream that enters them, with other values put in
at some sites and the values at others given back; with ``logits``, up to the logits. It works under ``jax.jit``,
``jax.vmap`` (in one pass of more rows) and ``jax.grad`` (by a second callback, which runs the segment again and torch's
autograd). Nothing but the stream goes from layer to layer, so that a model whose layers share more is refused.

On the CPU, callbacks get the buffers themselves: ``jax.pure_callback`` makes arrays of them, and waits for these in the
thread that has to make them where there is one core.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from saejax.errors import UserError
from saejax.models.config import RunRules, TorchConfig
from saejax.models.layers import Taps
from saejax.models.sites import KINDS, NEURONS, Site

Params = Any
RESTRICTED = "restricted_N"  # in the parameters: token ids of the only logits that are wanted


class LayerSegment(NamedTuple):
    """A segment of layers, see the module docstring; hashable."""

    config: TorchConfig  #: configuration of the model
    #: start and stop: its layers.
    start: int
    stop: int
    put: tuple[Site, ...] = ()  #: sites whose values are given, beside the stream
    get: tuple[Site, ...] = ()  #: sites whose values are wanted, before the stream leaving the segment or the logits
    logits: bool = False  #: whether logits are wanted in place of that stream


def embed(config: TorchConfig, params: Params, ids_xT: jax.Array) -> jax.Array:
    """Return the residual stream entering layer 0, [..., T, D]."""
    shape = jax.ShapeDtypeStruct((*ids_xT.shape, config.d_model), params["embed_VxD"].dtype)
    return _callback(config.functions.embed, [shape], ids_xT)[0]


def unembed(config: TorchConfig, params: Params, x_xD: jax.Array) -> jax.Array:
    """Return the logits [..., V] in fp32 of the stream leaving the last layer."""
    layers = config.n_layers
    logits_Nx1xV = _run(LayerSegment(config, layers, layers, logits=True), (x_xD.reshape(-1, 1, x_xD.shape[-1]),))[0]
    logits_xV = logits_Nx1xV.reshape(*x_xD.shape[:-1], config.vocab)
    if RESTRICTED in params:
        return jnp.take(logits_xV, params[RESTRICTED], axis=-1)
    return logits_xV


def run_layers(
    config: TorchConfig,
    x_xTxD: jax.Array,
    start: int | jax.Array,
    stop: int,
    taps: Taps,
    rules: RunRules,
    attention: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run layers as ``decoder.run_layers`` does; return the stream leaving them and what is collected.

    Raises:
      UserError: what is asked for goes into a layer's attention, or by rules of its own for gradients.
    """
    hook, hook_layers, collect = taps.hook, taps.hook_layers, taps.collect
    inside = attention is not None or not set(collect) <= {*KINDS, NEURONS} or hook_layers is None
    if inside or not isinstance(start, int) or rules.backward != "gradient" or rules.first_fixes:
        raise not_in_torch_error(config)
    collected: dict[str, list[jax.Array]] = {kind: [] for kind in collect}
    layers = collect if isinstance(collect, Mapping) else dict.fromkeys(collect, range(stop))
    for layer in [*sorted(set(hook_layers or ()) & set(range(start, stop)) if hook else ()), stop]:
        if start < layer:
            sites = tuple(
                Site(kind, earlier) for kind in collect for earlier in range(start, layer) if earlier in layers[kind]
            )
            *values, x_xTxD = _run(LayerSegment(config, start, layer, get=sites), (x_xTxD,))
            for site, value in zip(sites, values, strict=True):
                collected[site.kind].append(value)
        if layer < stop and hook:
            x_xTxD, at_sites = _run_hooked(config, layer, x_xTxD, taps)
            for kind in collect:
                collected[kind] += [at_sites[kind]] if layer in layers[kind] else []
        start = layer + 1
    return x_xTxD, {kind: jnp.stack(values) for kind, values in collected.items()}


def not_in_torch_error(config: TorchConfig) -> UserError:
    """Return the error for attribution graphs, heads and attention patterns, which PyTorch models do not support."""
    return UserError(
        f"the model of the family {config.family!r} runs in PyTorch, where attribution graphs, heads and attention "
        "patterns are not available: they need a model of a JAX family (--model.backend=jax)"
    )


def _run_hooked(config: TorchConfig, layer: int, x: jax.Array, taps: Taps) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run one layer with a hook; return the stream leaving it and the values at its sites.

    The layer runs once for all values, and again after each site whose value the hook changes.
    """
    hook = taps.hook
    assert hook
    sites = config.functions.sites_of(layer, taps.inner_sites or NEURONS in taps.collect)
    put: dict[Site, jax.Array] = {}
    at_sites: dict[str, jax.Array] = {}

    def run() -> Sequence[jax.Array]:
        """Run the layer with what was changed so far."""
        return _run(LayerSegment(config, layer, layer + 1, tuple(put), sites), (x, *put.values()))

    values = run()
    for index, site in enumerate(sites):
        unseen = site.kind == NEURONS and not taps.inner_sites
        new = values[index] if unseen else hook(site.kind, layer, values[index])
        # The same array means that the hook left the value alone: then the layer need not run again.
        at_sites[site.kind] = new
        if new is not values[index]:
            put[site] = new
            values = run()
    return values[-1], at_sites


def restrict_unembedding(params: Params, ids_N: jax.Array) -> Params:
    """Return parameters with which ``unembed`` gives the logits of these ids only."""
    return {**params, RESTRICTED: ids_N}


def as_prefix(stream_BxTxD: jax.Array, value_BxTxX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return stream and value of the site of clean prompts, for ``run_rows``, in the shape of keys, [1, P, T, 1, D]."""
    return stream_BxTxD[None, :, :, None], value_BxTxX[None, :, :, None]


def run_rows(
    run_suffix: Callable[[jax.Array, jax.Array], jax.Array], prefix: Any, rows: Any, values: Sequence[jax.Array]
) -> jax.Array:
    """Run edited prompts whole, where the decoder runs their changed ends only; return the stream at their tokens.

    Args:
      run_suffix: function of the stream and the site's value of whole prompts, [R, T, D].
      prefix: the result of ``as_prefix``.
      rows: ``split.SharedPrefixBatch``: which tokens stand where.
      values: stream and value of its tokens, [S, N, D].
    """
    shards, count, length = rows.token_index_SxRxT.shape

    def whole(clean: jax.Array, ends: jax.Array) -> jax.Array:
        """Put the tokens [S, N, D] of the rows' ends where they stand in clean prompts [1, P, T, 1, D]."""
        # Whole prompts, since torch keeps no keys and values between two segments.
        prompts = clean[0, :, :, 0][rows.prompt_SxR]
        ends = jax.vmap(lambda tokens, index: tokens[index])(ends, rows.token_index_SxRxT)
        positions = rows.first_SxR[..., None] + jnp.arange(length)[None, None]
        put = jax.vmap(jax.vmap(lambda prompt, position, end: prompt.at[position].set(end, mode="drop")))
        return put(prompts, positions, ends).reshape(shards * count, *prompts.shape[2:])

    stream, value = (whole(clean, tokens) for clean, tokens in zip(prefix, values, strict=True))
    leaving = run_suffix(stream, value).reshape(shards, count, *stream.shape[1:])
    pick = jax.vmap(lambda whole_rows, row_N, position_N: whole_rows[row_N, position_N])
    return pick(leaving, rows.row_SxN, rows.position_SxN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(segment: LayerSegment, values: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Run a segment on the stream entering it and the values of ``put``."""
    x_xTxD = values[0]
    like_x = jax.ShapeDtypeStruct(x_xTxD.shape, x_xTxD.dtype)
    logits = jax.ShapeDtypeStruct((*x_xTxD.shape[:-1], segment.config.vocab), jnp.float32)
    got = [
        jax.ShapeDtypeStruct((*x_xTxD.shape[:-1], segment.config.functions.width(site)), x_xTxD.dtype)
        for site in segment.get
    ]
    shapes = [*got, logits if segment.logits else like_x]
    return _callback(functools.partial(segment.config.functions.run, segment), shapes, *values)


def _run_forward(segment: LayerSegment, values: tuple[jax.Array, ...]) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Return the segment's values, and its inputs for the gradient."""
    return _run(segment, values), values


def _run_backward(
    segment: LayerSegment, values: tuple[jax.Array, ...], cotangents: Sequence[jax.Array]
) -> tuple[tuple[jax.Array, ...]]:
    """Return the gradients in the segment's inputs, by a second callback."""
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
    run = functools.partial(segment.config.functions.run_backward, segment)
    return (tuple(_callback(run, shapes, *values, *cotangents)),)


_run.defvjp(_run_forward, _run_backward)


def _callback(function: Callable[..., None], shapes: Sequence[jax.ShapeDtypeStruct], *values: jax.Array) -> list[Any]:
    """Call ``function`` with lists of buffers to write and of buffers to read."""

    def call(context: Any, out: Sequence[Any], *buffers: Any) -> None:
        """Call the function with the buffers themselves."""
        del context
        function(out, buffers)

    def call_on_host(*arrays: jax.Array) -> list[np.ndarray]:
        """Call the function with arrays on the host; return the arrays that it writes."""
        rows = arrays[0].shape[: arrays[0].ndim - values[0].ndim]  # of vmap
        out = [np.empty((*rows, *shape.shape), shape.dtype) for shape in shapes]
        function(out, arrays)
        return out

    if jax.default_backend() != "cpu":
        return jax.pure_callback(call_on_host, list(shapes), *values, vmap_method="broadcast_all")
    return buffer_callback(call, list(shapes), vmap_method="broadcast_all")(*values)

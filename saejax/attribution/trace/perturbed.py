"""The decoder with changes added at sites, and gradients with respect to them, through all that it computes.

A change is added after its site is read, so a read shows what came from below. Sites may be *frozen*: whatever comes
from below, the model goes on with the value that is given, and the change.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.models import decoder
from saejax.models.attention import whole_prompt_tables
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.decoder import run_layers
from saejax.models.sites import Site

IN_STREAM = -1  # in place of a kind: the stream that enters a layer is read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """The sites of a model that are read and changed; compiled programs depend on their kinds alone.

    Attributes:
      layer_S, kind_S: int32 of each site; kinds are counted in ``kinds``.
      slot_LxK: int32, which site stands at a layer; S: none.
      kinds: those that there are (static).
    """

    layer_S: np.ndarray
    kind_S: np.ndarray
    slot_LxK: np.ndarray
    kinds: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, sites: Sequence[Site], layers: int) -> "Places":
        """Return the places of the sites of a model with so many layers."""
        kinds = tuple(sorted({site.kind for site in sites}))
        layer_S = np.array([site.layer for site in sites], np.int32)
        kind_S = np.array([kinds.index(site.kind) for site in sites], np.int32)
        slot_LxK = np.full((layers, len(kinds)), len(sites), np.int32)
        slot_LxK[layer_S, kind_S] = np.arange(len(sites))
        return cls(layer_S, kind_S, slot_LxK, kinds)


class Ran(NamedTuple):
    """The stream entering each layer and the one leaving the last at a position, and what is read at each site."""

    stream_LxTxD: jax.Array
    last_D: jax.Array
    read_SxTxD: jax.Array


class Readings(NamedTuple):
    """A batch of targets: directions at a layer, a kind of site or ``IN_STREAM``, and a position."""

    vector_BxD: np.ndarray
    layer_B: np.ndarray
    kind_B: np.ndarray
    position_B: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    config: DecoderConfig,
    rules: RunRules,
    params: decoder.Params,
    places: Places,
    x_TxD: jax.Array,
    last: jax.Array,
    delta_SxTxD: jax.Array,
    frozen_SxTxD: jax.Array | None = None,
) -> Ran:
    """Run the model.

    Args:
      config: of the decoder (static).
      rules: of the run (static).
      params: of the model.
      places: the sites that are read and changed.
      x_TxD: the stream entering layer 0.
      last: position whose last stream is returned.
      delta_SxTxD: what is added at each site.
      frozen_SxTxD: values at which sites are frozen; None: they are not.
    """
    # As arrays of JAX, which the layer's number can index within the loop.
    places = jax.tree.map(jnp.asarray, places)

    def hook(kind: str, layer: int | jax.Array, value_TxD: jax.Array) -> jax.Array:
        slot_K = places.slot_LxK[layer]
        return _changed(places, kind, slot_K, value_TxD, _at(delta_SxTxD, slot_K), frozen_SxTxD)

    leaving_TxD, seen, _ = run_layers(
        config,
        params,
        x_TxD,
        0,
        config.n_layers,
        # In every layer, inside the loop: which sites there are is data, so that any set of layers shares the program.
        hook,
        hook_layers=None,
        rules=rules,
        collect=("resid_pre", *places.kinds),
        before_hook=True,
    )
    read_LxKxTxD = jnp.stack([seen[kind] for kind in places.kinds], axis=1)
    return Ran(seen["resid_pre"], leaving_TxD[last], read_LxKxTxD[places.layer_S, places.kind_S])


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(
    config: DecoderConfig,
    rules: RunRules,
    params: decoder.Params,
    places: Places,
    stream_LxTxD: jax.Array,
    frozen_SxTxD: jax.Array | None,
    readings: Readings,
    top: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of a batch of targets with respect to changes at sites and to the embedded tokens.

    Args:
      config: of the decoder (static).
      rules: of the run (static).
      params: of the model.
      places: the sites that are read and changed.
      stream_LxTxD: the stream entering each layer in the clean run.
      frozen_SxTxD: values at which sites are frozen; None: they are not.
      readings: the targets.
      top: no target reads above the stream entering this layer.

    Returns:
      [S, B, T, D] and [B, T, D].
    """
    batch, width = readings.vector_BxD.shape
    tokens, kinds = stream_LxTxD.shape[1], len(places.kinds)
    tables, places = whole_prompt_tables(config, tokens), jax.tree.map(jnp.asarray, places)
    at_BxTxD = (jnp.arange(tokens)[None] == readings.position_B[:, None])[..., None] * readings.vector_BxD[:, None]

    def seed(layer: jax.Array, kind: jax.Array) -> jax.Array:
        """Return the directions that are read at a layer and a kind, [B, T, D]; else 0."""
        here_B = (readings.layer_B == layer) & (readings.kind_B == kind)
        return jnp.where(here_B[:, None, None], at_BxTxD, 0)

    def down(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Pull the gradients through one layer, from its output to its input."""
        (above_BxTxD, site_SxBxTxD), layer = carry, top - 1 - index
        delta_KxTxD = jnp.zeros((kinds, tokens, width), stream_LxTxD.dtype)

        slot_K = places.slot_LxK[layer]

        def run_layer(x_TxD: jax.Array, delta_KxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Return the stream leaving the layer [T, D], and what is read at its sites [K, T, D], before changes."""
            read = {}

            def hook(kind: str, value_TxD: jax.Array) -> jax.Array:
                read[kind] = value_TxD
                return _changed(places, kind, slot_K, value_TxD, delta_KxTxD, frozen_SxTxD)

            leaving_TxD = decoder.run_layer(config, rules, params, layer, x_TxD, tables, hook)
            return leaving_TxD, jnp.stack([read[kind] for kind in places.kinds])

        _, pull = jax.vjp(run_layer, stream_LxTxD[layer], delta_KxTxD)
        read_BxKxTxD = jnp.moveaxis(jax.vmap(seed, (None, 0))(layer, jnp.arange(kinds)), 0, 1)
        below_BxTxD, of_BxKxTxD = jax.vmap(lambda *both: pull(both))(above_BxTxD, read_BxKxTxD)
        # Kinds without a site in this layer stand at a slot beyond the last, which is dropped.
        site_SxBxTxD = site_SxBxTxD.at[slot_K].set(jnp.moveaxis(of_BxKxTxD, 1, 0), mode="drop")
        return below_BxTxD + seed(layer, jnp.int32(IN_STREAM)), site_SxBxTxD

    site_SxBxTxD = jnp.zeros((len(places.layer_S), batch, tokens, width), stream_LxTxD.dtype)
    token_BxTxD, site_SxBxTxD = lax.fori_loop(0, top, down, (seed(top, jnp.int32(IN_STREAM)), site_SxBxTxD))
    return site_SxBxTxD, token_BxTxD


def _changed(
    places: Places,
    kind: str,
    slot_K: jax.Array,
    value_TxD: jax.Array,
    delta_KxTxD: jax.Array,
    frozen_SxTxD: jax.Array | None,
) -> jax.Array:
    """Return what the model goes on with at a site: its value, or the one at which it is frozen, and the change."""
    if kind not in places.kinds:
        return value_TxD
    index = places.kinds.index(kind)
    if frozen_SxTxD is not None:
        frozen_TxD = _at(frozen_SxTxD, slot_K[index])
        # Only where there is a site: elsewhere the model goes on with its value.
        value_TxD = jnp.where(slot_K[index] < len(frozen_SxTxD), frozen_TxD, value_TxD)
    return value_TxD + delta_KxTxD[index]


def _at(array_SxTxD: jax.Array, slots: jax.Array) -> jax.Array:
    """Return the entries of sites, 0 for slots without one."""
    return array_SxTxD.at[slots].get(mode="fill", fill_value=0)

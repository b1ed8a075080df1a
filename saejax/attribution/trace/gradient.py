"""Graphs with SAEs, where there are no transcoders: edges are activation x gradient.

An SAE writes its site's value as x = sum over features of f W_dec + b_dec + error. The edge from one of these terms to
a target is its dot product with the gradient of the target with respect to x, taken through all that the model
computes: the first-order estimate of what the target loses without the term (attribution patching; Nanda, 2023; with
features, Marks et al., 2024, arXiv 2403.19647). A target is the pre-activation of a feature at a later site, or a
logit; one backward pass gives its edges from all sites. Two kinds of edges:

    total    the gradient goes through the sites between, so what a term does through their features is counted here
             and again in the edges from these: a row adds up to more than the target
    direct   the sites between are frozen at their values: what goes through them is counted there alone, and
             influences, which follow paths, count each once

Edges are estimates: rows do not add up to their targets (``Graph.unexplained_R`` says by how much), with one exception:
direct edges with ``estimate="relp"`` in a model without biases do, since its rules make of every layer what is linear
(``DecoderConfig.backward``).
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.graph.nodes import BIAS, ERROR, TOKEN, Nodes
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.local.rows import TOKENS, Put
from saejax.attribution.trace.sae_run import SaeRun, SaeSites
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import whole_prompt_tables
from saejax.models.config import DecoderConfig, RunRules
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row


class Readings(NamedTuple):
    """A batch of targets: directions at a layer and a position."""

    vector_BxD: np.ndarray
    layer_B: np.ndarray
    in_stream_B: np.ndarray  #: whether the stream that enters the layer is read, or its site
    position_B: np.ndarray


class GradientRows:
    """Reads the sources' contributions off gradients.

    Args:
      run: of the prompt.
      readouts: the targets that are no features.

    Attributes:
      nodes: the sources: features, errors, tokens, and a bias for each SAE.
    """

    def __init__(self, run: SaeRun, readouts: Readouts):
        self._run, self._readouts, active, tokens = run, readouts, run.active, len(run.ids_P)
        layer_S, every_P = run.sites.layer_S, np.arange(tokens)
        self.nodes = Nodes.joined(
            active.nodes,
            Nodes.of(ERROR, np.repeat(layer_S, tokens), np.tile(every_P, len(layer_S))),
            Nodes.of(TOKEN, -1, every_P, run.ids_P),
            Nodes.of(BIAS, layer_S, 0),
        )
        # A feature that is active at many positions has one row here.
        key_A = active.layer_A.astype(np.int64) << 32 | active.feature_A
        _, first_U, self._row_A = np.unique(key_A, return_index=True, return_inverse=True)
        self._table_UxD = run.dictionaries.rows_of("W_dec", active.layer_A[first_U], active.feature_A[first_U])
        # The features of each site and position, which stand together.
        group_A = run.sites.slot_L[active.layer_A] * tokens + active.position_A
        self._starts = np.searchsorted(group_A, np.arange(len(layer_S) * tokens + 1))
        self._token_PxD = to_host(run.stream_LxTxD[0, :tokens])

    def __call__(self, new_F: np.ndarray | None, put: Put) -> None:
        """Compute the rows of some active features, or (None) of the readouts; see ``rounds.FillRows``."""
        run, readouts = self._run, self._readouts
        if new_F is None:
            top_B = np.full(len(readouts), run.model.config.n_layers, np.int32)
            last_B = np.full(len(readouts), len(run.ids_P) - 1, np.int32)
            self._read(Readings(readouts.vector_KxD, top_B, np.ones(len(readouts), bool), last_B), top_B, put)
        else:
            layer_F, position_F = run.active.layer_A[new_F], run.active.position_A[new_F]
            vector_FxD = run.dictionaries.rows_of("W_enc", layer_F, run.active.feature_A[new_F])
            # A site lies within its layer, below the stream that enters the next.
            self._read(Readings(vector_FxD, layer_F, np.zeros(len(new_F), bool), position_F), layer_F + 1, put)

    def _read(self, readings: Readings, top_B: np.ndarray, put: Put) -> None:
        """Compute what each source contributes to each target.

        Args:
          readings: any number of targets.
          top_B: for each the layer whose entering stream it does not reach above.
          put: takes targets and their rows, in any order and from more than one thread.
        """
        run, mesh = self._run, self._run.model.mesh
        length = run.stream_LxTxD.shape[1]
        size = max(TOKENS[mesh.devices.flat[0].platform] // length, 1) * mesh.shape["data"]
        order_B = np.argsort(-top_B, kind="stable")  # targets of one layer go together, and no higher than it

        def read(start: int) -> None:
            chosen_B = order_B[start : start + size]
            # Filled up with copies, so that one program serves all batches.
            batch = Readings(*by_row(mesh, *(part[np.resize(chosen_B, size)] for part in readings)))
            fixed = run.model.config, run.rules, run.direct, run.model.params, run.sites, run.stream_LxTxD
            gradients = _gradients(*fixed, batch, np.int32(top_B[chosen_B[0]]))
            row_BxN = self._contributions(*map(to_host, gradients))[: len(chosen_B)]
            if not np.isfinite(row_BxN).all():
                raise UserError(f"gradients of {run.model.source.name} are not finite: try --model.dtype=float32")
            put(chosen_B, row_BxN)

        with ThreadPoolExecutor(2 if mesh.size == 1 else 1) as pool:  # as in ``rows.RowTracer``
            list(pool.map(read, range(0, len(order_B), size)))

    def _contributions(self, site_SxBxTxD: np.ndarray, token_BxTxD: np.ndarray) -> np.ndarray:
        """Dot products of gradients with the sources' directions, fp32 [B, N]."""
        run, tokens = self._run, len(self._run.ids_P)
        at_SxPxBxD = np.moveaxis(site_SxBxTxD[:, :, :tokens], 2, 1)
        into_NxB = np.empty((len(self.nodes), len(token_BxTxD)), np.float32)
        starts, gradient_GxBxD = self._starts, at_SxPxBxD.reshape(-1, *at_SxPxBxD.shape[2:])
        # The features of a site and position share a gradient: one product for all of them.
        for start, stop, gradient_BxD in zip(starts, starts[1:], gradient_GxBxD, strict=False):
            into_NxB[start:stop] = self._table_UxD[self._row_A[start:stop]] @ gradient_BxD.T
        features = len(run.active)
        into_NxB[:features] *= run.active.value_A[:, None]
        errors_GxDx1 = run.error_SxTxD[:, :tokens].reshape(len(gradient_GxBxD), -1, 1)
        products = [
            np.matmul(gradient_GxBxD, errors_GxDx1)[..., 0],
            np.matmul(np.moveaxis(token_BxTxD[:, :tokens], 1, 0), self._token_PxD[..., None])[..., 0],
            np.matmul(at_SxPxBxD.sum(axis=1), run.b_dec_SxD[..., None])[..., 0],
        ]
        into_NxB[features:] = np.concatenate(products)
        return into_NxB.T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gradients(
    config: DecoderConfig,
    rules: RunRules,
    direct: bool,
    params: decoder.Params,
    sites: SaeSites,
    stream_LxTxD: jax.Array,
    readings: Readings,
    top: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of targets with respect to changes at sites [S, B, T, D] and to embedded tokens [B, T, D].

    Layer by layer from the top, as few streams are then kept.

    Args:
      config: of the decoder (static).
      rules: by which gradients go through the model (static).
      direct: whether gradients stop at sites (static).
      params: of the model.
      sites: of the SAEs.
      stream_LxTxD: the stream entering each layer.
      readings: the targets.
      top: no target reads above the stream entering this layer.
    """
    # As arrays of JAX, which the layer's number can index within the loop.
    tables, sites = whole_prompt_tables(config, stream_LxTxD.shape[1]), jax.tree.map(jnp.asarray, sites)
    at_BxT = jnp.arange(stream_LxTxD.shape[1])[None] == readings.position_B[:, None]

    def seed(layer: jax.Array, in_stream: bool) -> jax.Array:
        """Return the directions that are read of the stream entering a layer, or at its site, [B, T, D]; else 0."""
        here_B = (readings.layer_B == layer) & (readings.in_stream_B == in_stream)
        return jnp.where((at_BxT & here_B[:, None])[..., None], readings.vector_BxD[:, None], 0)

    def down(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Pull the gradients through one layer, from its output to its input."""
        (above_BxTxD, site_SxBxTxD), layer = carry, top - 1 - index
        slot = sites.slot_L[layer]
        kind_here = jnp.asarray(sites.kind_S).at[slot].get(mode="fill", fill_value=-1)

        def run_layer(x_TxD: jax.Array, delta_TxD: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Return the stream leaving the layer, and what is read at its site before changes, both [T, D]."""
            read = []

            def hook(kind: str, value_TxD: jax.Array) -> jax.Array:
                if kind not in sites.kinds:
                    return value_TxD
                # Only where there is a site: elsewhere the model goes on with its value.
                is_site = kind_here == sites.kinds.index(kind)
                read.append(jnp.where(is_site, value_TxD, 0))
                if direct:  # the model goes on with this value, whatever comes from below
                    value_TxD = jnp.where(is_site, lax.stop_gradient(value_TxD), value_TxD)
                return value_TxD + jnp.where(is_site, delta_TxD, 0)

            leaving_TxD = decoder.run_layer(config, rules, params, layer, x_TxD, tables, hook)
            return leaving_TxD, sum(read)

        _, pull = jax.vjp(run_layer, stream_LxTxD[layer], jnp.zeros_like(stream_LxTxD[0]))
        below_BxTxD, of_BxTxD = jax.vmap(lambda *both: pull(both))(above_BxTxD, seed(layer, False))
        # A layer without a site has a slot beyond the last, which is dropped.
        site_SxBxTxD = site_SxBxTxD.at[slot].set(of_BxTxD, mode="drop")
        return below_BxTxD + seed(layer, True), site_SxBxTxD

    above_BxTxD = seed(top, True)
    site_SxBxTxD = jnp.zeros((len(sites.layer_S), *above_BxTxD.shape), stream_LxTxD.dtype)
    token_BxTxD, site_SxBxTxD = lax.fori_loop(0, top, down, (above_BxTxD, site_SxBxTxD))
    return site_SxBxTxD, token_BxTxD

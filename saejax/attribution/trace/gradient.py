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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.graph.nodes import BIAS, ERROR, TOKEN, Nodes
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.local.rows import TOKENS, Put
from saejax.attribution.trace.sae_run import SaeRun
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import whole_prompt_tables
from saejax.models.config import DecoderConfig, RunRules
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row


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
        layer_S, every_P = np.array([site.layer for site in run.dictionaries.sites]), np.arange(tokens)
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
        group_A = np.searchsorted(layer_S, active.layer_A) * tokens + active.position_A
        self._starts = np.searchsorted(group_A, np.arange(len(layer_S) * tokens + 1))
        self._token_PxD = to_host(run.stream_LxTxD[0, :tokens])

    def __call__(self, new_F: np.ndarray | None, put: Put) -> None:
        """Compute the rows of some active features, or (None) of the readouts; see ``rounds.FillRows``."""
        run, readouts, mesh = self._run, self._readouts, self._run.model.mesh
        if new_F is None:
            vector_RxD, position_R = readouts.vector_KxD, np.full(len(readouts), len(run.ids_P) - 1)
            layer_R = np.full(len(readouts), run.model.config.n_layers)
        else:
            layer_R, position_R = run.active.layer_A[new_F], run.active.position_A[new_F]
            vector_RxD = run.dictionaries.rows_of("W_enc", layer_R, run.active.feature_A[new_F])
        length = run.stream_LxTxD.shape[1]
        size = max(TOKENS[mesh.devices.flat[0].platform] // length, 1) * mesh.shape["data"]
        order_R = np.argsort(-layer_R, kind="stable")  # targets of one layer go together, and no higher than it

        def fill(start: int) -> None:
            chosen_B = order_R[start : start + size]
            # Filled up with copies, so that one program serves all batches.
            filled_B = np.resize(chosen_B, size)
            gradients = self._gradients(layer_R[filled_B], position_R[filled_B], vector_RxD[filled_B])
            row_BxN = self._contributions(*gradients)[: len(chosen_B)]
            if not np.isfinite(row_BxN).all():
                raise UserError(f"gradients of {run.model.source.name} are not finite: try --model.dtype=float32")
            put(chosen_B, row_BxN)

        with ThreadPoolExecutor(2 if mesh.size == 1 else 1) as pool:  # as in ``rows.RowTracer``
            list(pool.map(fill, range(0, len(order_R), size)))

    def _gradients(
        self, layer_B: np.ndarray, position_B: np.ndarray, vector_BxD: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of targets with respect to changes at sites and to the embedded tokens.

        Args:
          layer_B: the layer at whose site each reads, or the number of layers: it reads the stream leaving the last.
          position_B: where.
          vector_BxD: the directions that are read.

        Returns:
          [S, B, T, D] and [B, T, D].
        """
        run, (n_layers, length, width) = self._run, self._run.stream_LxTxD.shape

        def read_at(layer: int) -> jax.Array:
            """Return the directions that are read at a layer, [B, T, D]."""
            read_BxTxD, here = np.zeros((len(layer_B), length, width), np.float32), np.flatnonzero(layer_B == layer)
            read_BxTxD[here, position_B[here]] = vector_BxD[here]
            return by_row(run.model.mesh, read_BxTxD)[0]

        kind_of, of_sites = {site.layer: site.kind for site in run.dictionaries.sites}, list[jax.Array]()
        above_BxTxD = read_at(n_layers)
        # Layer by layer from the top, as few streams are then kept.
        for layer in reversed(range(n_layers)):
            if layer > layer_B.max():  # nothing is read above
                site_BxTxD = jnp.zeros_like(above_BxTxD)
            else:
                static = run.model.config, run.rules, kind_of.get(layer, ""), run.direct
                inputs = np.int32(layer), run.stream_LxTxD[layer], above_BxTxD, read_at(layer)
                above_BxTxD, site_BxTxD = _pull_layer(*static, run.model.params, *inputs)
            if layer in kind_of:
                of_sites.append(site_BxTxD)
        return np.stack([to_host(site_BxTxD) for site_BxTxD in reversed(of_sites)]), to_host(above_BxTxD)

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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _pull_layer(
    config: DecoderConfig,
    rules: RunRules,
    kind: str,
    direct: bool,
    params: decoder.Params,
    layer: jax.Array,
    x_TxD: jax.Array,
    above_BxTxD: jax.Array,
    read_BxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Pull gradients through a layer, from its output to its input; and to changes at its site, each [B, T, D].

    Args:
      config: of the decoder (static).
      rules: by which gradients go through the model (static).
      kind: of the layer's site; "": it has none (static).
      direct: whether gradients stop at the site (static).
      params: of the model.
      layer: its number.
      x_TxD: the stream entering it.
      above_BxTxD: gradients with respect to the stream leaving it.
      read_BxTxD: directions that are read at the site, before changes.
    """
    tables = whole_prompt_tables(config, len(x_TxD))

    def run_layer(x_TxD: jax.Array, delta_TxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        read = [jnp.zeros_like(x_TxD)]

        def hook(hook_kind: str, value_TxD: jax.Array) -> jax.Array:
            if hook_kind != kind:
                return value_TxD
            read.append(value_TxD)
            # Frozen, the model goes on with this value, whatever comes from below.
            return (lax.stop_gradient(value_TxD) if direct else value_TxD) + delta_TxD

        return decoder.run_layer(config, rules, params, layer, x_TxD, tables, hook), read[-1]

    _, pull = jax.vjp(run_layer, x_TxD, jnp.zeros_like(x_TxD))
    return jax.vmap(lambda *both: pull(both))(above_BxTxD, read_BxTxD)

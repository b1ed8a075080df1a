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

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from saejax.attribution.graph.nodes import BIAS, ERROR, TOKEN, Nodes
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.local.rows import TOKENS, Put
from saejax.attribution.trace.sae_run import Readings, SaeRun
from saejax.errors import UserError
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
            gradients = run.gradients(batch, np.int32(top_B[chosen_B[0]]))
            row_BxN = self._contributions(*gradients)[: len(chosen_B)]
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

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

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import BIAS, ERROR, FEATURE, TOKEN, Nodes
from saejax.attribution.local.dictionaries import LayerSaes
from saejax.attribution.local.prompt_run import prompt_ids
from saejax.attribution.local.readouts import Target, read_targets
from saejax.attribution.local.rows import TOKENS, Put
from saejax.attribution.trace.prompt import check_max_features
from saejax.attribution.trace.rounds import Traced, attribute_in_rounds, make_graph
from saejax.attribution.trace.sae_run import IN_STREAM, Readings, SaeRun
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row
from saejax.runner.parts import OnProgress, silent

Saes = LayerSaes | Dictionary | str | Path | Sequence[Dictionary | str | Path]


def trace_gradient(model: LanguageModel, saes: Saes, prompt: str | Sequence[int], **options: Any) -> Graph:
    """Return the graph of a prompt with SAEs: that of ``trace_saes``, which has the same arguments."""
    return trace_saes(model, saes, prompt, **options).graph


def trace_saes(
    model: LanguageModel,
    saes: Saes,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] = (),
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int | None = None,
    estimate: str = "gradient",
    direct: bool = False,
    chat: bool = False,
    on_progress: OnProgress = silent,
) -> Traced[SaeRun]:
    """Trace a prompt with SAEs; features are used at all positions but attention sinks.

    Args:
      model: the language model.
      saes: SAEs, or folders of such or of trained stacks; at most one of each layer, at any of its sites.
      prompt: the text, or its token ids.
      targets: what is explained, as in ``trace_prompt``.
      max_logits: maximum number of tokens that are explained, if no targets are named.
      logit_mass: total probability of these tokens, 0 to 1.
      max_features: maximum number of features with nodes; None: all active ones.
      estimate: "gradient", or "relp", by the rules of relevance patching.
      direct: whether edges are direct; see the top of this module.
      chat: put a text into the tokenizer's chat template, as a user's turn.
      on_progress: called with the rows of the graph that are done and of all; may raise to stop.

    Raises:
      UserError: SAEs, model, prompt or targets do not go together; the message says why.
    """
    check_max_features(max_features)
    ids_P = prompt_ids(model, prompt, chat)
    run = SaeRun.of(model, LayerSaes.of(saes), ids_P, estimate, direct)
    readouts = read_targets(run, targets, max_logits, logit_mass)
    rows, active = _Rows(run), run.active
    kind_A = run.sites.kind_S[_slots(run, active.layer_A)]

    def fill(new_F: np.ndarray | None, put: Put) -> None:
        if new_F is None:
            top_K, stream_K = (np.full(len(readouts), n, np.int32) for n in (model.config.n_layers, IN_STREAM))
            last_K = np.full_like(top_K, len(ids_P) - 1)
            rows(Readings(readouts.vector_KxD, top_K, stream_K, last_K), top_K, put)
        else:
            layer_F, position_F = active.layer_A[new_F], active.position_A[new_F]
            vector_FxD = run.dictionaries.rows_of("W_enc", layer_F, active.feature_A[new_F])
            # A site lies within its layer, below the stream that enters the next.
            rows(Readings(vector_FxD, layer_F, kind_A[new_F], position_F), layer_F + 1, put)

    count = min(max_features or len(active), len(active))
    chosen_F, store = attribute_in_rounds(run, rows.nodes, readouts, fill, count, on_progress)
    if not (np.isfinite(store.row_BxC).all() and np.isfinite(store.dropped_R).all()):
        raise UserError(f"gradients of {model.source.name} are not finite: try --model.dtype=float32")
    edges = f"{'direct' if direct else 'total'} {estimate} x activation, first-order estimates"
    settings = dict(max_logits=max_logits, logit_mass=logit_mass, max_features=max_features, edges=edges)
    return Traced(make_graph(run, rows.nodes, readouts, chosen_F, store, prompt, settings), run, readouts)


class _Rows:
    """Reads the sources' contributions off gradients.

    Attributes:
      nodes: the sources: features, errors, tokens, and a bias for each SAE.
    """

    def __init__(self, run: SaeRun):
        self._run, active, tokens = run, run.active, len(run.ids_P)
        layer_S, every_P = run.sites.layer_S, np.arange(tokens)
        self.nodes = Nodes.joined(
            Nodes.of(FEATURE, active.layer_A, active.position_A, active.feature_A, active.value_A),
            Nodes.of(ERROR, np.repeat(layer_S, tokens), np.tile(every_P, len(layer_S))),
            Nodes.of(TOKEN, -1, every_P, run.ids_P),
            Nodes.of(BIAS, layer_S, 0),
        )
        # A feature that is active at many positions has one row here.
        key_A = active.layer_A.astype(np.int64) << 32 | active.feature_A
        _, first_U, self._row_A = np.unique(key_A, return_index=True, return_inverse=True)
        self._table_UxD = run.dictionaries.rows_of("W_dec", active.layer_A[first_U], active.feature_A[first_U])
        # The features of each site and position, which stand together.
        group_A = _slots(run, active.layer_A) * tokens + active.position_A
        self._starts = np.searchsorted(group_A, np.arange(len(layer_S) * tokens + 1))
        self._token_PxD = to_host(run.stream_LxTxD[0, :tokens])

    def __call__(self, readings: Readings, top_B: np.ndarray, put: Put) -> None:
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
            put(chosen_B, self._contributions(*gradients)[: len(chosen_B)])

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


def _slots(run: SaeRun, layer_A: np.ndarray) -> np.ndarray:
    """Return the index of each layer's SAE among the SAEs."""
    return np.searchsorted(run.sites.layer_S, layer_A)

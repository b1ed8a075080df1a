"""Checks of a graph:

1. Is the arithmetic right? A feature's activation is raised with everything frozen: every target must move by the
   weight of its edge, times how often the activation was added. Edges of SAEs are first-order estimates, so they are
   not checked in this way (``double``).
2. Does the local linear model predict the real one? A feature is doubled with nothing frozen: how well do the edges
   predict the effects (``double``)?
3. Does the shown part do the work (``faithfulness_curve``)? The model is run with some of the features and errors,
   without the others. At every layer and every position at which features are used the MLP's output becomes

       sum over kept features of f_t W_dec + b_dec + skip(read_t) + error_t if it is kept

   with f_t and error_t of that run: all comes from the embedding of the tokens anew, nothing is frozen. A feature that
   is not active in the prompt is never kept; with all features and errors kept this is the model. With m a readout, C
   the circuit, M the model and 0 the run in which no feature and no error is kept (Marks et al., 2024,
   arXiv 2403.19647),

       faithfulness = (m(C) - m(0)) / (m(M) - m(0)),        incompleteness = the same of all that is not in C

   A circuit that does the work has the first near 1 and the second near 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from saejax.attribution.checks import scale
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import ERROR, FEATURE
from saejax.attribution.graph.pruning import prune_each
from saejax.attribution.local.edits import Circuit
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.rows import Readouts
from saejax.attribution.local.state import RELP
from saejax.attribution.trace.gradient import SaeRun
from saejax.models.attention import attend, whole_prompt_tables

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of influence, to which a graph is pruned
# How often an activation is added with all frozen. The model is then affine, and the rounding of a difference of two
# fp32 streams matters less the larger the difference is.
_FROZEN_TIMES = 64


@dataclasses.dataclass(frozen=True)
class DoublingResults:
    """Features changed one by one."""

    features: int  #: how many
    #: their activation added 64 times with all frozen as the graph does, a 64th of what happens against the edges: the
    #: largest difference over the largest edge; None: a graph of SAEs
    held_error: float | None
    #: of edges with what happens when activations are doubled and nothing is frozen, over all targets that an edge
    #: reaches, -1 to 1; None: fewer than 3 such edges
    correlation: float | None


@dataclasses.dataclass(frozen=True)
class CurveResults:
    """The model run with a part of the graph alone, for growing shares of influence; a number for each share."""

    share: tuple[float, ...]  #: of the influence of all nodes, 0 to 1
    features: tuple[int, ...]  #: that are kept
    errors: tuple[int, ...]  #: that are kept
    #: the first target with these alone, between ``empty`` (0) and ``model`` (1); None where these two are the same
    faithfulness: tuple[float | None, ...]
    incompleteness: tuple[float | None, ...]  #: the same with all others alone
    model: float  #: the first target of the whole model
    empty: float  #: the first target without any feature and error


class Doubling(NamedTuple):
    """Changes of the targets when features were doubled, one by one."""

    node_E: np.ndarray  #: nodes of the graph that were doubled
    edge_ExR: np.ndarray  #: the weights of their edges
    free_ExR: np.ndarray  #: changes with nothing frozen
    results: DoublingResults  #: the figures that the stage reports


def double(local: LocalModel | SaeRun, graph: Graph, readouts: Readouts, count: int = 32, seed: int = 456) -> Doubling:
    """Double features of a whole graph one by one.

    Args:
      local: of the prompt.
      graph: of the local model and the readouts, not pruned.
      readouts: what the graph explains.
      count: number of features, sampled by the seed; all if there are fewer.
      seed: seed of the sample.
    """
    features = graph.nodes[graph.slice_of(FEATURE)]
    index_F = local.active.find(features.layer_N, features.position_N, features.index_N)
    # Ascending: rows of the graph are in this order.
    node_E = np.sort(np.random.default_rng(seed).permutation(len(features))[:count])
    # In float64, as changes are small differences from these values.
    clean_R = np.concatenate([local.active.value_A[index_F], readouts.value_K]).astype(np.float64)

    def effects(times: int, freeze: str) -> np.ndarray:
        """Return by how much targets [E, R] move when a feature's activation is added ``times`` times, over that."""
        rows = [scale(features[np.array([node])], 1 + times) for node in node_E]
        changed = local.run(rows, freeze, readouts=readouts, features=index_F, logits=False)
        return (np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1) - clean_R) / times

    edge_ExR, free_ExR = graph.adjacency_RxS[:, node_E].T.astype(np.float64), effects(1, "none")
    held_error, correlation = None, None
    if isinstance(local, LocalModel):
        difference = np.abs(effects(_FROZEN_TIMES, "all") - edge_ExR).max()
        held_error = float(difference / (np.abs(edge_ExR).max() or 1.0))
    edges, free = edge_ExR[edge_ExR != 0], free_ExR[edge_ExR != 0]
    if len(edges) > 2 and edges.std() and free.std():  # two points always lie on a line
        correlation = float(np.corrcoef(edges, free)[0, 1])
    return Doubling(node_E, edge_ExR, free_ExR, DoublingResults(len(node_E), held_error, correlation))


def faithfulness_curve(
    local: LocalModel, graph: Graph, readouts: Readouts, shares: Sequence[float] = SHARES
) -> CurveResults:
    """Prune a whole graph to growing shares of its influence, and run each part alone and all the rest alone.

    Args:
      local: of the graph.
      graph: not pruned; features without a node are never kept.
      readouts: the first of them is judged.
      shares: of influence, 0 to 1.

    Raises:
      UserError: the first readout is not finite in a run.
    """
    circuits = [circuit_of(local, pruned) for pruned in prune_each(graph, shares)]
    nothing = Circuit(np.zeros(len(local.active), bool), np.zeros_like(circuits[0].errors_LxP))
    # The model, too, is run as a circuit, of everything: differences have the rounding of one program.
    rows = [*circuits, *(circuit.complement() for circuit in circuits), nothing.complement(), nothing]
    *read, model, empty = local.run(rows, readouts=readouts, logits=False).readout_RxK[:, 0].tolist()
    relative = [(readout - empty) / (model - empty) if model != empty else None for readout in read]
    count = len(circuits)
    return CurveResults(
        share=tuple(shares),
        features=tuple(int(circuit.features_A.sum()) for circuit in circuits),
        errors=tuple(int(circuit.errors_LxP.sum()) for circuit in circuits),
        faithfulness=tuple(relative[:count]),
        incompleteness=tuple(relative[count:]),
        model=model,
        empty=empty,
    )


def push_up(local: LocalModel, added: Callable[[int], np.ndarray], until: int) -> np.ndarray:
    """Return what vectors change of the stream entering a layer: the linear layers run forwards, [S, T, D].

    Args:
      local: of the prompt.
      added: returns what is added to the stream entering a layer, [S, T, D].
      until: the layer.
    """
    tables = whole_prompt_tables(local.model.config, local.stream_LxTxD.shape[1])
    attend_forwards = functools.partial(attend, local.model.config, RELP)
    change_SxTxD = added(0)
    for layer in range(until):
        run = lambda x_TxD: local.frozen.layer(layer, tables, x_TxD, attend_forwards)[0]  # noqa: B023, E731
        push = lambda change_TxD: jax.jvp(run, (local.stream_LxTxD[layer],), (change_TxD,))[1]  # noqa: B023, E731
        change_SxTxD = np.asarray(jax.vmap(push)(change_SxTxD)) + added(layer + 1)
    return change_SxTxD


def circuit_of(local: LocalModel, graph: Graph) -> Circuit:
    """Return the features and errors of a pruned graph."""
    features, errors = graph.nodes[graph.slice_of(FEATURE)], graph.nodes[graph.slice_of(ERROR)]
    errors_LxP = np.zeros((local.model.config.n_layers, len(local.ids_P)), bool)
    errors_LxP[errors.layer_N, errors.position_N] = True
    features_A = np.zeros(len(local.active), bool)
    features_A[local.active.find(features.layer_N, features.position_N, features.index_N)] = True
    return Circuit(features_A, errors_LxP)

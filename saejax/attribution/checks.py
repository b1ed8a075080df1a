"""Run the prompt of a graph again: rows of changes, and checks of the graph.

Rows of changes for ``LocalModel.run`` are made of features with the activation that they have in the prompt, such as
``graph.nodes[indices]``. A row is a list of changes that are made together; lists can be joined with +, and thousands
of rows run in one call. ``matched`` samples random features as controls.

Checks of a graph:

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

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE, Nodes
from saejax.attribution.graph.pruning import prune_each
from saejax.attribution.local.edits import Change, Circuit
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.results import CurveResults, DoublingResults
from saejax.attribution.trace.gradient import SaeRun
from saejax.errors import UserError

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of influence, to which a graph is pruned
_TRIES = 20  # for each random set, at the same positions and then at any
# How often an activation is added with all frozen. The model is then affine, and the rounding of a difference of two
# fp32 streams matters less the larger the difference is.
_FROZEN_TIMES = 64


def scale(features: Nodes, factor: float) -> list[Change]:
    """Return changes that set features to a multiple of the activation that they have in the prompt."""
    return set_to(features, factor * features.value_N.astype(np.float64))


def set_to(features: Nodes, value: float | np.ndarray) -> list[Change]:
    """Return changes that set features to an activation, all to one or each to its own."""
    values = np.broadcast_to(np.asarray(value, np.float64), len(features)).tolist()
    return [Change(*key, value) for key, value in zip(_keys(features), values, strict=True)]


def matched(run: PromptRun, features: Nodes, draws: int, seed: int = 456) -> list[Nodes]:
    """Sample sets of other active features, as many in each layer, at the same positions as far as possible.

    Where these make too few different sets, more are sampled at any positions.

    Args:
      run: of the prompt.
      features: for which the sets are controls.
      draws: number of sets, all different; fewer where there are no more.
      seed: of the sample.

    Raises:
      UserError: a layer has too few active features beside these.
    """
    rng = np.random.default_rng(seed)
    taken = set(_keys(features))
    active = run.active.nodes
    candidates = active[np.array([key not in taken for key in _keys(active)], bool)]
    chosen_sets: dict[tuple[int, ...], Nodes] = {}
    # At the positions first; only where these give too few sets, anywhere.
    for number in range(2 * _TRIES * draws):
        if len(chosen_sets) == draws:
            break
        order = rng.permutation(len(candidates))
        parts = []
        for layer in np.unique(features.layer_N):
            of_layer = features.position_N[features.layer_N == layer]
            pool = order[candidates.layer_N[order] == layer]
            if len(pool) < len(of_layer):
                raise UserError(
                    f"layer {layer} has {len(pool)} other active features: expected {len(of_layer)} or more"
                )
            near = number < _TRIES * draws
            parts.append(_at_positions(pool, candidates.position_N[pool], of_layer) if near else pool[: len(of_layer)])
        # In one order, so that the same set drawn again is noticed.
        chosen = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
        chosen_sets.setdefault(tuple(chosen.tolist()), candidates[chosen])
    return list(chosen_sets.values())


def _at_positions(pool: np.ndarray, position: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return as many of a shuffled pool as are wanted at each position, then the first of the rest."""
    chosen = np.zeros(len(pool), bool)
    for place, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        chosen[np.flatnonzero(position == place)[:count]] = True
    chosen[np.flatnonzero(~chosen)[: len(wanted) - chosen.sum()]] = True
    return pool[chosen]


def _keys(features: Nodes) -> list[tuple[int, int, int]]:
    """Return layer, position and index of each."""
    columns = features.layer_N, features.position_N, features.index_N
    return list(zip(*(column.tolist() for column in columns), strict=True))


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


def circuit_of(local: LocalModel, graph: Graph) -> Circuit:
    """Return the features and errors of a pruned graph."""
    features, errors = graph.nodes[graph.slice_of(FEATURE)], graph.nodes[graph.slice_of(ERROR)]
    errors_LxP = np.zeros((local.model.config.n_layers, len(local.ids_P)), bool)
    errors_LxP[errors.layer_N, errors.position_N] = True
    features_A = np.zeros(len(local.active), bool)
    features_A[local.active.find(features.layer_N, features.position_N, features.index_N)] = True
    return Circuit(features_A, errors_LxP)

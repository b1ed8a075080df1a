"""What a part of a graph does alone: the model run with some of the features and errors, the others gone.

At every layer and every position at which features are used the MLP's output becomes

    sum over kept features of f_t W_dec + b_dec + skip(read_t) + error_t if it is kept

with f_t and error_t of that run: all comes from the embedding of the tokens anew, nothing is frozen. A feature that is
active in the prompt and not kept may have a mean activation instead of none; one that is not active there has none, so
that with all features and errors kept this is the model. With m a readout, C the circuit, M the model and 0 the run in
which no feature and no error is kept (Marks et al., 2024, arXiv 2403.19647),

    faithfulness = (m(C) - m(0)) / (m(M) - m(0)),        incompleteness = the same of all that is not in C

A circuit that does the work has the first near 1 and the second near 0.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from saejax.attribution.checks.circuit_runs import Circuit, run_circuits
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE
from saejax.attribution.graph.pruning import SHARES, prune_each
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.results import CurveResults
from saejax.attribution.trace.targets import Readouts


def curve(
    replacement: Replacement,
    graph: Graph,
    readouts: Readouts,
    shares: Sequence[float] = SHARES,
    means: Mapping[int, np.ndarray] | None = None,
) -> CurveResults:
    """Prunes a whole graph to growing shares of its influence, and runs each part alone and all the rest alone.

    Args:
      graph: of the replacement model, not pruned; features that it has no node for are never kept.
      readouts: the first of them is judged.
      means: see ``run_circuits``.
    """
    circuits = [circuit_of(replacement, pruned) for pruned in prune_each(graph, shares)]
    none = Circuit(np.zeros(len(replacement.active), bool), np.zeros_like(circuits[0].errors_LxP))
    rows = [*circuits, *(circuit.complement() for circuit in circuits), none.complement(), none]
    *found, model, empty = run_circuits(replacement, rows, readouts, means)[:, 0].tolist()
    relative = [(readout - empty) / (model - empty) if model != empty else None for readout in found]
    count = len(circuits)
    return CurveResults(
        share=tuple(shares),
        features=tuple(int(circuit.features_A.sum()) for circuit in circuits),
        errors=tuple(int(circuit.errors_LxP.sum()) for circuit in circuits),
        readout=tuple(found[:count]),
        complement=tuple(found[count:]),
        faithfulness=tuple(relative[:count]),
        incompleteness=tuple(relative[count:]),
        model=model,
        empty=empty,
        rest="zero" if means is None else "mean",
    )


def circuit_of(replacement: Replacement, graph: Graph) -> Circuit:
    """The features and errors of a pruned graph."""
    active, nodes = replacement.active, graph.nodes
    layers, positions = replacement.model.config.n_layers, len(replacement.ids_P)
    features, errors = nodes[graph.slice_of(FEATURE)], nodes[graph.slice_of(ERROR)]
    errors_LxP = np.zeros((layers, positions), bool)
    errors_LxP[errors.layer_N, errors.position_N] = True
    features_A = np.zeros(len(active), bool)
    features_A[active.places(features.layer_N, features.position_N, features.index_N)] = True
    return Circuit(features_A, errors_LxP)

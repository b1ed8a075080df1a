"""Faithfulness of parts of a graph: the model run with some of the features and errors, without the others.

At every layer and every position at which features are used the MLP's output becomes

    sum over kept features of f_t W_dec + b_dec + skip(read_t) + error_t if it is kept

with f_t and error_t of that run: all comes from the embedding of the tokens anew, nothing is frozen. A feature that is
not active in the prompt is never kept; with all features and errors kept this is the model. With m a readout, C the
circuit, M the model and 0 the run in which no feature and no error is kept (Marks et al., 2024, arXiv 2403.19647),

    faithfulness = (m(C) - m(0)) / (m(M) - m(0)),        incompleteness = the same of all that is not in C

A circuit that does the work has the first near 1 and the second near 0.
"""

from collections.abc import Sequence

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE
from saejax.attribution.graph.pruning import SHARES, prune_each
from saejax.attribution.local.edits import Circuit
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.results import CurveResults
from saejax.errors import UserError


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
      UserError: the first readout is not of the last layer's output, or is not finite in a run.
    """
    if readouts.layer_K[0] != local.model.config.n_layers:
        raise UserError("a circuit is judged by logits, or by a direction of the stream that leaves the last layer")
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
        readout=tuple(read[:count]),
        complement=tuple(read[count:]),
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

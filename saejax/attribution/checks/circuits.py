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

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saejax.attribution.checks.circuit_runs import Circuit, run_circuits
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import ERROR, FEATURE
from saejax.attribution.graph.pruning import SHARES, prune_each
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.results import CurveResults
from saejax.attribution.trace.targets import Readouts


@dataclasses.dataclass(frozen=True)
class CircuitCurve:
    """Circuits of growing size.

    Attributes:
      share_C: the share of influence for which each was pruned.
      features_C, errors_C: how many each keeps.
      readout_C, complement_C: the first readout of each, and of all that is not in it; fp32.
      model, empty: of the whole model, and with no feature and no error kept.
    """

    share_C: np.ndarray
    features_C: np.ndarray
    errors_C: np.ndarray
    readout_C: np.ndarray
    complement_C: np.ndarray
    model: float
    empty: float

    @property
    def faithfulness_C(self) -> np.ndarray:
        """1: as the model; 0: as if nothing were kept. NaN where these two do not differ."""
        return self._normalised(self.readout_C)

    @property
    def incompleteness_C(self) -> np.ndarray:
        """How much is left without the circuit: 0 if it was all."""
        return self._normalised(self.complement_C)

    def results(self, rest: str) -> CurveResults:
        """What the stage says of it; ``rest`` is what was left out: "zero" or "mean"."""
        columns: Any = {
            name: tuple(value if np.isfinite(value) else None for value in getattr(self, f"{name}_C").tolist())
            for name in ("share", "features", "errors", "readout", "complement", "faithfulness", "incompleteness")
        }
        return CurveResults(**columns, model=self.model, empty=self.empty, rest=rest)

    def _normalised(self, readout_C: np.ndarray) -> np.ndarray:
        whole = self.model - self.empty
        return (readout_C - self.empty) / whole if whole else np.full(len(readout_C), np.nan)


def curve(
    replacement: Replacement,
    graph: Graph,
    readouts: Readouts,
    shares: Sequence[float] = SHARES,
    means: Mapping[int, np.ndarray] | None = None,
) -> CircuitCurve:
    """Prunes a whole graph to growing shares of its influence, and runs each part alone and all the rest alone.

    Args:
      graph: of the replacement model, not pruned; features that it has no node for are never kept.
      readouts: the first of them is judged.
      means: see ``run_circuits``.
    """
    circuits = [circuit_of(replacement, pruned) for pruned in prune_each(graph, shares)]
    none = Circuit(np.zeros(len(replacement.active), bool), np.zeros_like(circuits[0].errors_LxP))
    rows = [*circuits, *(circuit.complement() for circuit in circuits), none.complement(), none]
    readout_C = run_circuits(replacement, rows, readouts, means)[:, 0]
    count = len(circuits)
    return CircuitCurve(
        share_C=np.asarray(shares, np.float64),
        features_C=np.array([circuit.features_A.sum() for circuit in circuits]),
        errors_C=np.array([circuit.errors_LxP.sum() for circuit in circuits]),
        readout_C=readout_C[:count],
        complement_C=readout_C[count : 2 * count],
        model=float(readout_C[-2]),
        empty=float(readout_C[-1]),
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

"""Whether a graph says what the model does.

Three questions, each answered by running the prompt again:

1. Is the arithmetic right? A feature is set to twice its activation with all held as it was (``interventions``): every
   target must move by the weight of its edge.
2. Does the local picture hold? The same with nothing held: how well do the edges foretell what really happens?
3. Does the part that is shown do the work? ``circuits.curve``.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from saejax.attribution.circuits import places_of
from saejax.attribution.graph import FEATURE, Graph
from saejax.attribution.interventions import Change, intervene
from saejax.attribution.replacement import Replacement
from saejax.attribution.targets import Readouts


@dataclasses.dataclass(frozen=True)
class Doubling:
    """What became of the targets when features were doubled, one by one.

    Attributes:
      node_R: which nodes of the graph were doubled.
      edge_RxT: what the graph says.
      held_RxT: what happened with all held.
      free_RxT: what happened with nothing held.
    """

    node_R: np.ndarray
    edge_RxT: np.ndarray
    held_RxT: np.ndarray
    free_RxT: np.ndarray

    @property
    def held_error(self) -> float:
        """The largest difference of edges and what happened with all held, over the largest edge (1 if all are 0)."""
        largest = np.abs(self.edge_RxT).max()
        return float(np.abs(self.held_RxT - self.edge_RxT).max() / (largest or 1.0))

    def correlations(self) -> dict[str, float | None]:
        """Of edges and what happened with nothing held, over all targets that an edge reaches; None: fewer than 3."""
        reached_RxT = self.edge_RxT != 0
        edge_E, free_E = self.edge_RxT[reached_RxT], self.free_RxT[reached_RxT]
        if len(edge_E) < 3 or not edge_E.std() or not free_E.std():
            return dict(pearson=None, spearman=None, sign=None)
        return dict(
            pearson=float(np.corrcoef(edge_E, free_E)[0, 1]),
            spearman=float(spearmanr(edge_E, free_E).statistic),
            sign=float((np.sign(edge_E) == np.sign(free_E)).mean()),
        )

    def results(self) -> dict[str, Any]:
        """For JSON."""
        return dict(features=len(self.node_R), held_error=self.held_error, free=self.correlations())


def double(replacement: Replacement, graph: Graph, readouts: Readouts, count: int = 32, seed: int = 456) -> Doubling:
    """Doubles features of a whole graph one by one.

    Args:
      graph: of the replacement model and the readouts, not pruned.
      count: how many features, drawn by the seed; all if there are fewer.
    """
    features = graph.nodes[graph.slice_of(FEATURE)]
    place_F = places_of(replacement.active, features.layer_N, features.position_N, features.index_N)[1]
    node_R = np.sort(np.random.default_rng(seed).permutation(len(features))[:count])
    rows = [
        [Change(int(f.layer_N[0]), int(f.position_N[0]), int(f.index_N[0]), 2 * float(f.value_N[0]))]
        for f in (features[node : node + 1] for node in node_R)
    ]
    clean_T = np.concatenate([replacement.active.value_A[place_F], readouts.value_K]).astype(np.float64)
    moved = {}
    for hold in ("all", "nothing"):
        changed = intervene(replacement, rows, readouts, place_F, hold)
        moved[hold] = np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1) - clean_T[None]
    edge_RxT = graph.adjacency_TxS[:, node_R].T.astype(np.float64)
    return Doubling(node_R, edge_RxT, moved["all"], moved["nothing"])

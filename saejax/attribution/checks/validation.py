"""Validate a graph by running the prompt again.

1. Is the arithmetic right? A feature's activation is raised with everything frozen: every target must move by the
   weight of its edge, times how often the activation was added. Edges of SAEs are first-order estimates, so they are
   not checked in this way.
2. Does the local linear model predict the real one? A feature is doubled with nothing frozen: how well do the edges
   predict the effects?

``circuits.faithfulness_curve`` asks whether the shown part does the work.
"""

import dataclasses

import numpy as np
from scipy.stats import spearmanr

from saejax.attribution.checks.changes import scale
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import FEATURE
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.results import DoublingResults, EdgeCorrelation
from saejax.attribution.trace.sae_run import SaeRun

# How often an activation is added with all frozen. The model is then affine, and the rounding of a difference of two
# fp32 streams matters less the larger the difference is.
_FROZEN_TIMES = 64


@dataclasses.dataclass(frozen=True)
class Doubling:
    """Changes of the targets when features were doubled, one by one.

    Attributes:
      node_E: nodes of the graph that were doubled.
      edge_ExR: the weights of their edges.
      frozen_ExR: changes with all frozen, per activation added; None with SAEs.
      free_ExR: changes with nothing frozen.
    """

    node_E: np.ndarray
    edge_ExR: np.ndarray
    frozen_ExR: np.ndarray | None
    free_ExR: np.ndarray

    @property
    def held_error(self) -> float | None:
        """The largest difference of edges and changes with all frozen, over the largest edge (1 if all are 0)."""
        if self.frozen_ExR is None:
            return None
        largest = np.abs(self.edge_ExR).max()
        return float(np.abs(self.frozen_ExR - self.edge_ExR).max() / (largest or 1.0))

    def correlations(self) -> EdgeCorrelation:
        """Return correlations of edges and changes with nothing frozen, over all targets that an edge reaches."""
        reached_ExR = self.edge_ExR != 0
        edges, free = self.edge_ExR[reached_ExR], self.free_ExR[reached_ExR]
        # Two points always lie on a line.
        if len(edges) < 3 or not edges.std() or not free.std():
            return EdgeCorrelation(None, None, None)
        return EdgeCorrelation(
            pearson=float(np.corrcoef(edges, free)[0, 1]),
            spearman=float(spearmanr(edges, free).statistic),
            sign=float((np.sign(edges) == np.sign(free)).mean()),
        )

    @property
    def results(self) -> DoublingResults:
        """The figures that the stage reports."""
        return DoublingResults(len(self.node_E), self.held_error, self.correlations())


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

    edge_ExR = graph.adjacency_RxS[:, node_E].T.astype(np.float64)
    frozen_ExR = effects(_FROZEN_TIMES, "all") if isinstance(local, LocalModel) else None
    return Doubling(node_E, edge_ExR, frozen_ExR, effects(1, "none"))

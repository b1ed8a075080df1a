"""An order of features by elimination: what the answer needs least goes first, judged by what is left each time.

Where many features are gone, paths through them are gone too, and what they fed is smaller or silent. So features go in
steps, and before each the graph's linear model is run with those that are left: with A[r, s] the edges, c_r what no
feature adds to feature r, a_r its activation in the prompt, and x_r what is left of that, as a part of it,

    x_r = relu(c_r + sum over features s that are left of A[r, s] x_s) / a_r

and the effect of one that is left is x times the gradient of the readouts, through the features that are left and not
silent. With all features that is activation x gradient through the transcoders, with attention and norms as they were:
the signed sum over all paths. Influence (``pruning``) takes absolute shares instead, so that of two large edges which
cancel both count. What features without a node added is gone from the start.
"""

import dataclasses

import numpy as np

from saejax.attribution.graph.data import GraphData
from saejax.attribution.graph.nodes import FEATURE

_STEP = 0.1  # of the features that are left, those that go in a step


def elimination_order(graph: GraphData, weight_K: np.ndarray) -> np.ndarray:
    """The features of a graph, those that are eliminated last first: places among the features, int64 [F].

    Args:
      graph: a whole one.
      weight_K: of each readout; features that lower the sum go before those that raise it.
    """
    model = LinearModel.of(graph, weight_K)
    left, gone = np.arange(graph.count(FEATURE)), []
    while len(left):
        effect_L = model.effects(left)
        out = np.argsort(effect_L, kind="stable")[: max(int(_STEP * len(left)), 1)]
        gone.append(left[out])
        left = np.delete(left, out)
    return np.concatenate(gone)[::-1]


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """A graph's linear model, of which features can be left out.

    Attributes:
      edges_FxF: between features, targets by sources; these come by layer.
      activation_F: of the features in the prompt, above 0.
      fixed_F: of each, what no feature adds.
      direct_F: what each adds to the readouts by itself.
      layer_F: of each, rising.
    """

    edges_FxF: np.ndarray
    activation_F: np.ndarray
    fixed_F: np.ndarray
    direct_F: np.ndarray
    layer_F: np.ndarray

    @classmethod
    def of(cls, graph: GraphData, weight_K: np.ndarray) -> "LinearModel":
        """That of a whole graph; what features without a node add is left out.

        Args:
          weight_K: of each readout.
        """
        count, adjacency_RxS = graph.count(FEATURE), graph.adjacency_RxS
        edges_FxF, activation_F = adjacency_RxS[:count, :count], graph.value_R[:count].astype(np.float64)
        fixed_F = activation_F - graph.unkept_R[:count] - edges_FxF.sum(axis=1, dtype=np.float64)
        direct_F = np.asarray(weight_K, np.float64) @ adjacency_RxS[count:, :count]
        return cls(edges_FxF, activation_F, fixed_F, direct_F, graph.nodes.layer_N[:count])

    def effects(self, left_L: np.ndarray) -> np.ndarray:
        """What each of the features that are left does to the readouts, float64 [L].

        Args:
          left_L: which, ascending.
        """
        part_F, gradient_F = np.zeros(len(self.direct_F)), self.direct_F.copy()
        layers = np.split(left_L, np.flatnonzero(np.diff(self.layer_F[left_L])) + 1)
        for own in layers:
            below = slice(own[0])
            input_L = self.fixed_F[own] + self.edges_FxF[own, below] @ part_F[below]
            part_F[own] = np.maximum(input_L, 0) / self.activation_F[own]
        for own in reversed(layers):
            alive = own[part_F[own] > 0]
            gradient_F += (gradient_F[alive] / self.activation_F[alive]) @ self.edges_FxF[alive]
        return (part_F * gradient_F)[left_L]

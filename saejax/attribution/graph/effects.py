"""What each node of a graph does to a readout in all: the signed sum over its paths.

A feature's activation is its pre-activation as far as it stays active, so in the graph's linear model a share x of the
input of target r taken away takes the share x of all that r adds. With A[r, s] the edges, a_r the activation of target
r, and w the readouts that are asked for, the effect of source s is

    e_s = sum over readouts r of w_r A[r, s]  +  sum over features r of e_r A[r, s] / a_r

which is activation x gradient through the transcoders, with attention and norms as they were. Influence (``pruning``)
takes absolute shares instead, so that of two large edges which cancel both count.
"""

import numpy as np

from saejax.attribution.graph.data import GraphData
from saejax.attribution.graph.nodes import FEATURE


def total_effects(graph: GraphData, weight_K: np.ndarray) -> np.ndarray:
    """The effect of every source on a sum of readouts, float64 [S].

    Args:
      graph: a whole one.
      weight_K: of each readout.
    """
    features = graph.count(FEATURE)
    activation_F = graph.nodes.value_N[graph.slice_of(FEATURE)].astype(np.float64)
    layer_R = graph.nodes.layer_N[graph.target_R]
    effect_S = np.asarray(weight_K, np.float64) @ graph.adjacency_RxS[features:]
    for layer in np.unique(layer_R[:features])[::-1]:  # edges go up through the layers
        own = np.flatnonzero(layer_R[:features] == layer)
        effect_S += (effect_S[own] / activation_F[own]) @ graph.adjacency_RxS[own]
    return effect_S

"""Checks of a graph:

1. Is the arithmetic right? A feature's activation is raised with everything frozen: every target must move by the
   weight of its edge, times how often the activation was added. Edges of SAEs are first-order estimates, so they are
   not checked in this way (``double``).
2. Does the local linear model predict the real one? A feature is doubled with nothing frozen: how well do the edges
   predict the effects (``double``)?
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from saejax.attribution.checks import scale
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import FEATURE
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.rows import Readouts
from saejax.attribution.local.state import RELP
from saejax.attribution.trace.gradient import SaeRun
from saejax.models.attention import attend, whole_prompt_tables

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

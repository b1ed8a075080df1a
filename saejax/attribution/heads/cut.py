"""Which edges' heads are looked for: all, or in a dense graph those between its most influential nodes.

What the heads of edges take grows with the nodes of the pruned graph: a pass up for each source, one down for each
target, and products for each pair. In a dense graph this is a multiple of what the rows took, so edges are left out
until it is no more. The parts of those that stay are the same, whatever is cut.
"""

import dataclasses

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import LOGIT, TOKEN
from saejax.attribution.trace.rows import graph_flops, row_flops
from saejax.models.config import DecoderConfig

_LEAST = 1e11  # operations, of about a second on two cores, that are not worth a cut
_OF_ROWS = 0.8  # of the rows' operations: with as many, heads took 1.04 times the processor time of the trace
# About a 15th of all layers and positions is between a source and a target, mean over pairs; these products take three
# times as long as passes of as many operations, as measured on a CPU.
_BETWEEN = 0.2


def pair_flops(model: DecoderConfig, tokens: int) -> float:
    """The products of one target with one source, as so many operations of a pass; mean over pairs."""
    return 2.0 * model.n_heads * model.d_head * _BETWEEN * model.n_layers * tokens


def most_flops(rows: float) -> float:
    """As many operations as finding heads may take where a graph's rows took so many."""
    return max(_OF_ROWS * rows, _LEAST)


def within(graph: Graph, whole: Graph, model: DecoderConfig) -> tuple[Graph, float | None]:
    """The graph with no edges but those whose heads can be found in the time in which its rows were.

    Args:
      graph: a pruned one.
      whole: that it was cut from.
      model: whose heads.

    Returns:
      The graph with these edges alone, and the share of influence of the nodes that they are between; None: it is the
      whole graph. Tokens and logits are always among them.
    """
    assert graph.pruning is not None
    nodes, (source_E, target_E, _) = graph.nodes, graph.edges()
    is_source_N, is_target_N = (np.isin(np.arange(len(nodes)), ends) for ends in (source_E, target_E))
    tokens, each = len(graph.ids_P), row_flops(model, 1, 1)
    down_N = np.where(nodes.kind_N == LOGIT, model.n_layers, nodes.layer_N + 1) * (nodes.position_N + 1)
    up_N = (model.n_layers - 1 - nodes.layer_N) * (tokens - nodes.position_N)
    passes_N = each * (is_target_N * down_N + is_source_N * up_N)
    always_N = np.isin(nodes.kind_N, (TOKEN, LOGIT))
    order_N = np.lexsort((graph.pruning.influence_N, ~always_N))
    sources, targets = (np.cumsum(is_there_N[order_N]) for is_there_N in (is_source_N, is_target_N))
    need_N = np.cumsum(passes_N[order_N]) + pair_flops(model, tokens) * sources * targets
    kept_N = np.zeros(len(nodes), bool)
    kept_N[order_N] = (need_N <= most_flops(graph_flops(whole, model))) | always_N[order_N]
    if kept_N.all():
        return graph, None
    of_source_S = kept_N[: graph.adjacency_RxS.shape[1]]
    adjacency_RxS = graph.adjacency_RxS * (kept_N[graph.target_R][:, None] & of_source_S[None])
    share = float(graph.pruning.influence_N[kept_N & ~always_N].max(initial=0))
    return dataclasses.replace(graph, adjacency_RxS=adjacency_RxS), share

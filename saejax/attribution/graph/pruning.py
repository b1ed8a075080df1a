"""How much each node matters for the logits, and the part of a graph that matters most.

The influence of a node counts all paths from it to the logits. With N[t, s] = |A[t, s]| / sum_s |A[t, s]|, the share
of target t's input that comes from source s, and w the weights of the logits (their probabilities),

    influence = w (N + N^2 + N^3 + ...)

Edges go up through the layers, so one sweep over the rows from the logits down gives this sum exactly. Definitions are
those of circuit-tracer (Ameisen et al., 2025, Circuit Tracing, transformer-circuits.pub); nothing here is as large as
nodes by nodes. Nodes of the kinds first_mlp and bias are left out.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from saejax.attribution.graph.graph import BIAS, ERROR, FEATURE, FIRST_MLP, LOGIT, TOKEN, Graph, Pruning, Scores
from saejax.errors import UserError

_SMALLEST = 1e-10  # least sum of a row's weights that it is divided by
_BLOCK = 1 << 22  # numbers of the matrix that are worked on at once
_LOW_BITS = 16  # of an fp32 score, those that the first pass of the search for a threshold leaves out


def influence(
    adjacency_TxS: np.ndarray,
    layer_T: np.ndarray,
    column_T: np.ndarray,
    weight_T: np.ndarray,
    elsewhere_T: np.ndarray | None = None,
) -> np.ndarray:
    """The influence of every source, float64 [S].

    Args:
      adjacency_TxS: rows with edges from layers below their own only.
      layer_T: of each row; logits stand above all.
      column_T: where each row's node is among the sources; -1 for a logit.
      weight_T: weights of the logits; 0 for the others.
      elsewhere_T: absolute sum of each row's edges from sources that are not among these; None: there are none.
    """
    elsewhere_T = np.zeros(len(layer_T)) if elsewhere_T is None else elsewhere_T
    influence_S = np.zeros(adjacency_TxS.shape[1])
    for layer in np.unique(layer_T)[::-1]:
        own = np.flatnonzero(layer_T == layer)
        for rows in _blocks(own, adjacency_TxS.shape[1]):
            weight = weight_T[rows] + np.where(column_T[rows] >= 0, influence_S[column_T[rows]], 0)
            part_TxS = np.abs(adjacency_TxS[rows])
            sum_T = part_TxS.sum(axis=1, dtype=np.float64) + elsewhere_T[rows]
            influence_S += (weight / np.maximum(sum_T, _SMALLEST)) @ part_TxS
    return influence_S


def scores(graph: Graph) -> Scores:
    """Replacement and completeness scores of a whole graph."""
    adjacency_TxS, influence_S = _scored(graph), source_influence(graph)
    tokens, errors = influence_S[graph.slice_of(TOKEN)].sum(), influence_S[graph.slice_of(ERROR)].sum()
    weight_T = _target_influence(graph, influence_S)
    error_T = np.zeros(len(weight_T))
    for rows in _blocks(np.arange(len(weight_T)), adjacency_TxS.shape[1]):
        part_TxS = np.abs(adjacency_TxS[rows])
        error_T[rows] = part_TxS[:, graph.slice_of(ERROR)].sum(axis=1, dtype=np.float64)
        error_T[rows] /= np.maximum(part_TxS.sum(axis=1, dtype=np.float64), _SMALLEST)
    total = influence_S.sum() + graph.probability_K.sum(dtype=np.float64)
    # Errors and tokens have no input, so no error has a part in it.
    return Scores(float(tokens / max(tokens + errors, _SMALLEST)), float(1 - (weight_T @ error_T) / total))


def cumulative_share(influence_N: np.ndarray) -> np.ndarray:
    """For each node, the share of all influence that the nodes up to it have, the most influential first; fp32 [N]."""
    order_N = np.argsort(-influence_N, kind="stable")
    share_N = np.empty(len(influence_N), np.float32)
    share_N[order_N] = np.cumsum(influence_N[order_N]) / max(influence_N.sum(), _SMALLEST)
    return share_N


def prune(graph: Graph, nodes: float = 0.8, edges: float = 0.98, top_edges: int = 0) -> Graph:
    """The most influential nodes of a graph, and the most influential edges between them.

    1. Nodes are kept, the most influential first, until they have the share ``nodes`` of all influence; tokens and
       logits always.
    2. Among these, an edge scores N[t, s] (influence[t] + w[t]); edges are kept until they have the share ``edges`` of
       all scores, and of each target at most ``top_edges``, the largest by size (0: all).
    3. Features and errors from which no edge goes, and features to which none comes, are dropped until there are none.

    Raises:
      UserError: the graph is pruned already, or a share is not between 0 and 1.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 <= share <= 1:
            raise UserError(f"prune: {name} is {share}: expected a share of influence, 0 to 1")
    if top_edges < 0:
        raise UserError(f"prune: top_edges is {top_edges}: expected a number of edges, or 0 for all")
    if graph.pruning:
        raise UserError("this graph is pruned already: prune the whole one")
    influence_N = np.zeros(len(graph.nodes), np.float32)
    influence_S = source_influence(graph)
    influence_N[: len(influence_S)] = influence_S
    kept_N = influence_N >= share_threshold(lambda: [influence_N], nodes)
    kept_N = (kept_N | np.isin(graph.nodes.kind_N, (TOKEN, LOGIT))) & ~np.isin(graph.nodes.kind_N, (FIRST_MLP, BIAS))
    cut = _cut(graph, kept_N)
    edge_TxS = _influential_edges(cut, edges)
    if top_edges:
        edge_TxS &= _largest_edges(cut, top_edges)
    connected_N = _connected(cut, edge_TxS)
    cut.adjacency_TxS[~edge_TxS] = 0
    node_N = np.flatnonzero(kept_N)[connected_N].astype(np.int32)
    pruning = Pruning(nodes, edges, node_N, cumulative_share(influence_N)[node_N], scores(graph), top_edges)
    return dataclasses.replace(_cut(cut, connected_N), pruning=pruning)


def share_threshold(blocks: Callable[[], Iterable[np.ndarray]], share: float) -> float:
    """The smallest of the largest values that together have a share of the sum of all; infinity if all are 0.

    Values are not sorted: a first pass sums them by their leading bits, a second one sorts those whose leading bits are
    the threshold's.

    Args:
      blocks: gives all values, fp32 and 0 or above, some arrays at a time; called twice.
      share: 0 to 1.
    """
    sum_B = np.zeros(1 << (32 - _LOW_BITS))
    for values in blocks():
        bits = values.reshape(-1).view(np.uint32) >> _LOW_BITS
        sum_B += np.bincount(bits, weights=values.reshape(-1), minlength=len(sum_B))
    if not sum_B.any():
        return float("inf")
    down_B = np.cumsum(sum_B[::-1])[::-1]  # of values with these leading bits or larger ones
    wanted = share * down_B[0]
    bucket = int(np.flatnonzero((sum_B > 0) & (down_B >= wanted))[-1])
    found = [v[v.view(np.uint32) >> _LOW_BITS == bucket] for v in (block.reshape(-1) for block in blocks())]
    descending = -np.sort(-np.concatenate(found))
    above = down_B[bucket] - sum_B[bucket]
    index = np.searchsorted(above + np.cumsum(descending, dtype=np.float64), wanted)
    return float(descending[min(index, len(descending) - 1)])


def _influential_edges(graph: Graph, share: float) -> np.ndarray:
    """Step 2 of ``prune``: True where an edge stays, [T, S]."""
    adjacency_TxS, influence_S = graph.adjacency_TxS, source_influence(graph)
    factor_T = _target_influence(graph, influence_S)

    def blocks() -> Iterator[np.ndarray]:
        for rows in _blocks(np.arange(len(factor_T)), adjacency_TxS.shape[1]):
            part_TxS = np.abs(adjacency_TxS[rows])
            total_T = np.maximum(part_TxS.sum(axis=1, dtype=np.float64), _SMALLEST)
            yield part_TxS * (factor_T[rows] / total_T).astype(np.float32)[:, None]

    threshold = share_threshold(blocks, share)
    return np.concatenate([score_TxS >= threshold for score_TxS in blocks()])


def _largest_edges(graph: Graph, count: int) -> np.ndarray:
    """True at the ``count`` largest weights of each row by size, [T, S]."""
    size_TxS, edge_TxS = np.abs(graph.adjacency_TxS), np.ones(graph.adjacency_TxS.shape, bool)
    if count < size_TxS.shape[1]:
        np.put_along_axis(edge_TxS, np.argpartition(-size_TxS, count - 1, axis=1)[:, count:], False, axis=1)
    return edge_TxS


def _connected(graph: Graph, edge_TxS: np.ndarray) -> np.ndarray:
    """Step 3 of ``prune``: True where a node stays, [N]; edges of the others become False."""
    kind_N, features = graph.nodes.kind_N, graph.count(FEATURE)
    keep_N, sources = np.ones(len(kind_N), bool), edge_TxS.shape[1]
    while True:
        before = keep_N.copy()
        keep_N[:sources] &= edge_TxS.any(axis=0) | (kind_N[:sources] == TOKEN)
        keep_N[:features] &= edge_TxS[:features].any(axis=1)
        if np.array_equal(keep_N, before):
            return keep_N
        edge_TxS[:features][~keep_N[:features]] = False
        edge_TxS[:, ~keep_N[:sources]] = False


def _cut(graph: Graph, keep_N: np.ndarray) -> Graph:
    """The graph of some of the nodes, all logits among them, with a matrix of its own."""
    rows, columns = graph.target_T[keep_N[graph.target_T]], np.flatnonzero(keep_N[: graph.adjacency_TxS.shape[1]])
    row_T = np.searchsorted(graph.target_T, rows)
    of_targets = {name: getattr(graph, name)[row_T] for name in ("value_T", "constant_T", "unkept_T")}
    adjacency_TxS = graph.adjacency_TxS[np.ix_(row_T, columns)]
    return dataclasses.replace(graph, adjacency_TxS=adjacency_TxS, nodes=graph.nodes[keep_N], **of_targets)


def _scored(graph: Graph) -> np.ndarray:
    """The matrix with the columns that take part in influences: features, errors and tokens."""
    return graph.adjacency_TxS[:, : graph.slice_of(TOKEN).stop]


def source_influence(graph: Graph) -> np.ndarray:
    """The influence of the graph's features, errors and tokens, in this order, float64."""
    features = graph.count(FEATURE)
    column_T = np.concatenate([np.arange(features), np.full(graph.count(LOGIT), -1)])
    return influence(_scored(graph), graph.nodes.layer_N[graph.target_T], column_T, _row_weights(graph))


def _target_influence(graph: Graph, influence_S: np.ndarray) -> np.ndarray:
    """Influence of the features and weights of the logits, float64 [T]."""
    return np.concatenate([influence_S[graph.slice_of(FEATURE)], graph.probability_K])


def _row_weights(graph: Graph) -> np.ndarray:
    """Weights of the logits, 0 for features, float64 [T]."""
    return np.concatenate([np.zeros(graph.count(FEATURE)), graph.probability_K.astype(np.float64)])


def _blocks(rows: np.ndarray, width: int) -> list[np.ndarray]:
    """The rows in parts of about ``_BLOCK`` numbers."""
    size = max(1, _BLOCK // max(width, 1))
    return [rows[start : start + size] for start in range(0, len(rows), size)]

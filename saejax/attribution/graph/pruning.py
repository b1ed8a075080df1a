"""Influence of each node on the logits, and pruning by it.

Influence is defined in ``graph.data``. Definitions are those of circuit-tracer (Ameisen et al., 2025, Circuit Tracing,
transformer-circuits.pub); nothing here is as large as nodes by nodes. Nodes of the kinds first_mlp and bias are left
out.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

from saejax.attribution.graph.data import (
    BIAS,
    ERROR,
    FEATURE,
    FIRST_MLP,
    LOGIT,
    TOKEN,
    GraphData,
    GraphScores,
    Nodes,
    Pruning,
    logit_weights,
    sweep,
)
from saejax.errors import UserError

AnyGraph = TypeVar("AnyGraph", bound=GraphData)
_BLOCK = 1 << 22  # numbers of the matrix that are worked on at once


def influence(
    adjacency_RxS: np.ndarray,
    layer_R: np.ndarray,
    column_R: np.ndarray,
    weight_R: np.ndarray,
) -> np.ndarray:
    """Return the influence of every source, float64 [S].

    Args:
      adjacency_RxS: edges from each source to each row's node, all from lower layers.
      layer_R: layer of each row; logits are above all layers.
      column_R: index of each row's node among the sources; -1 for a logit.
      weight_R: weights of the logits; 0 for other rows.
    """
    influence_S = np.zeros(adjacency_RxS.shape[1])

    def add(layer: int, rows: np.ndarray, passed_on: np.ndarray) -> None:
        for block in _blocks(len(rows), adjacency_RxS.shape[1]):
            part_BxS = np.abs(adjacency_RxS[rows[block]])
            # A target without input passes nothing on.
            influence_S[:] += _ratio(passed_on[block], part_BxS.sum(axis=1, dtype=np.float64)) @ part_BxS

    sweep(layer_R, column_R, weight_R, influence_S, add)
    return influence_S


def scores(graph: GraphData, influence_S: np.ndarray | None = None) -> GraphScores:
    """Return replacement and completeness scores of a whole graph, and ``source_influence`` if it is known."""
    influence_S = source_influence(graph) if influence_S is None else influence_S
    tokens, errors = influence_S[graph.slice_of(TOKEN)].sum(), influence_S[graph.slice_of(ERROR)].sum()
    total = influence_S.sum() + logit_weights(graph.probability_K).sum()
    # The influence of errors is the sum over nodes of a node's influence times the share that errors have of its input.
    return GraphScores(float(_ratio(tokens, tokens + errors)), float(1 - _ratio(errors, total)))


def score_subgraph(graph: GraphData, nodes: Collection[str]) -> GraphScores:
    """Return the scores of a graph with some of its features alone, as circuit-tracer and Neuronpedia define them.

    What other features write counts as error: they lose their inputs, and their edges are added, with their signs, to
    those of the error of their layer and position, which would hold it if the set lacked them.

    Args:
      graph: the graph, whole or pruned.
      nodes: ids of nodes, or one of them; their features are kept. Tokens, errors and logits are, anyway.

    Raises:
      UserError: the graph has no such node.
    """
    table, is_feature_N = graph.nodes, graph.nodes.kind_N == FEATURE
    ids, kept = table.ids(graph.n_layers), [nodes] if isinstance(nodes, str) else list(nodes)
    if unknown := set(kept) - set(ids):
        raise UserError(f"{min(unknown, key=str)!r} is no node of this graph: see its ids")
    keep_N = np.isin(ids, kept) | ~is_feature_N
    merged_X = np.flatnonzero(~keep_N | (table.kind_N == ERROR))
    place_2xX = np.stack([table.layer_N[merged_X], table.position_N[merged_X]])
    place_2xG, group_X = np.unique(place_2xX, axis=1, return_inverse=True)
    error_RxG = graph.adjacency_RxS[:, merged_X] @ np.eye(place_2xG.shape[1], dtype=np.float32)[group_X]
    features, tokens = (np.flatnonzero(keep_N & (table.kind_N == kind)) for kind in (FEATURE, TOKEN))
    rows = keep_N[graph.target_R]
    merged = dataclasses.replace(
        graph,
        adjacency_RxS=np.hstack([graph.adjacency_RxS[:, features], error_RxG, graph.adjacency_RxS[:, tokens]])[rows],
        nodes=Nodes.joined(table[features], Nodes.of(ERROR, *place_2xG), table[tokens], table[graph.slice_of(LOGIT)]),
    )
    return scores(merged)


def _ratio(part: Any, whole: Any) -> Any:
    """Return part / whole, 0 where both are 0."""
    return part / np.where(whole > 0, whole, 1.0)


def cumulative_share(influence_N: np.ndarray) -> np.ndarray:
    """Return each node's cumulative share of all influence, the most influential first, fp32 [N]."""
    # Stable: nodes of equal influence keep the order of the table.
    order_N = np.argsort(-influence_N, kind="stable")
    share_N = np.empty(len(influence_N), np.float32)
    share_N[order_N] = _ratio(np.cumsum(influence_N[order_N]), influence_N.sum())
    return share_N


def prune_each(
    graph: AnyGraph, shares: Iterable[float], edges: float = 0.98, top_edges: int = 0, min_weight: float = 0.0
) -> Iterator[AnyGraph]:
    """Yield the most influential nodes of a graph, for each of several shares of influence.

    1. Nodes are kept, the most influential first, until they have the share of all influence; tokens and logits always.
    2. Among these, an edge scores N[r, s] (influence[r] + w[r]); edges are kept until they have the share ``edges`` of
       all scores, and of each target at most ``top_edges``, the largest by size (0: all), none of them smaller than
       ``min_weight``.
    3. Features and errors from which no edge goes, and features to which none comes, are dropped until there are none.

    Args:
      graph: a whole one.
      shares: of the influence of all nodes, 0 to 1.
      edges: share of the scores of all edges between them, 0 to 1.
      top_edges: maximum number of edges of each target, 0 for all.
      min_weight: smallest size of an edge, in units of the target's pre-activation.

    Yields:
      Graphs with matrices of their own; their ``pruning`` says what was kept.

    Raises:
      UserError: the graph is pruned already, a share is not between 0 and 1, or a number is negative.
    """
    if not isinstance(top_edges, Integral) or top_edges < 0:
        raise UserError(f"prune: top_edges is {top_edges}: expected a number of edges, or 0 for all")
    if not isinstance(min_weight, Real) or not 0 <= min_weight < float("inf"):
        raise UserError(f"prune: min_weight is {min_weight}: expected a size, 0 or above")
    if graph.pruning:
        raise UserError("this graph is pruned already: prune the whole one")
    influence_S = source_influence(graph)
    whole = scores(graph, influence_S)
    influence_N = np.zeros(len(graph.nodes), np.float32)
    influence_N[: len(influence_S)] = influence_S
    share_N = cumulative_share(influence_N)
    for nodes in shares:
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not isinstance(share, Real) or not 0 <= share <= 1:
                raise UserError(f"prune: {name} is {share!r}: expected a share of influence, 0 to 1")
        kept_N = influence_N >= share_threshold(influence_N, nodes)
        kept_N |= np.isin(graph.nodes.kind_N, (TOKEN, LOGIT))
        # Their columns are not scored, so that they have no influence to be kept by.
        kept_N &= ~np.isin(graph.nodes.kind_N, (FIRST_MLP, BIAS))
        cut = _cut(graph, kept_N)
        edge_RxS = _influential_edges(cut, edges)
        if top_edges:
            edge_RxS &= _largest_edges(cut, top_edges)
        if min_weight:
            edge_RxS &= np.abs(cut.adjacency_RxS) >= min_weight
        connected_N = _connected(cut, edge_RxS)
        # The cut has a matrix of its own: the whole graph keeps all edges.
        cut.adjacency_RxS[~edge_RxS] = 0
        node_N = np.flatnonzero(kept_N)[connected_N].astype(np.int32)
        pruning = Pruning(nodes, edges, node_N, share_N[node_N], whole, top_edges, min_weight)
        yield dataclasses.replace(_cut(cut, connected_N), pruning=pruning)


def emptying_threshold(graph: GraphData, nodes: float, edges: float, top_edges: int, min_weight: float) -> str:
    """Return which threshold of ``prune_each`` leaves a graph without features, by its name; "" if it has none anyway.

    Thresholds are lifted one after the other, the one that most often drops all features first, until one is kept.

    Args:
      graph: a whole one.
      nodes: as in ``prune_each``, like the others.
      edges: likewise.
      top_edges: likewise.
      min_weight: likewise.
    """
    thresholds: dict[str, Any] = dict(nodes=nodes, edges=edges, top_edges=top_edges, min_weight=min_weight)
    for name, lifted in dict(top_edges=0, min_weight=0.0, edges=1.0, nodes=1.0).items():
        thresholds[name] = lifted
        shares, others = [thresholds["nodes"]], {key: value for key, value in thresholds.items() if key != "nodes"}
        if next(prune_each(graph, shares, **others)).count(FEATURE):
            return name
    return ""


def share_threshold(values: np.ndarray, share: float) -> float:
    """Return the threshold at or above which values have a share of the sum of all values; infinity if all are 0.

    Args:
      values: fp32, 0 or above, of any shape.
      share: share of the sum, 0 to 1.
    """
    rising = values[values > 0]
    if not len(rising):
        return float("inf")
    rising.sort()  # in place: of a large graph these are hundreds of millions
    descending = rising[::-1]
    sums = np.cumsum(descending, dtype=np.float64)
    return float(descending[min(np.searchsorted(sums, share * sums[-1]), len(sums) - 1)])


def _influential_edges(graph: GraphData, share: float) -> np.ndarray:
    """Step 2 of ``prune_each``: True where an edge stays, [R, S]."""
    adjacency_RxS, influence_S = graph.adjacency_RxS, source_influence(graph)
    factor_R = np.concatenate([influence_S[graph.slice_of(FEATURE)], logit_weights(graph.probability_K)])

    def blocks() -> Iterator[np.ndarray]:
        for rows in _blocks(len(factor_R), adjacency_RxS.shape[1]):
            score_BxS = np.abs(adjacency_RxS[rows])
            total_B = score_BxS.sum(axis=1, dtype=np.float64)
            score_BxS *= _ratio(factor_R[rows], total_B).astype(np.float32)[:, None]
            yield score_BxS

    # Computed twice: the scores of all edges, most of them 0, would take as much memory as the matrix.
    threshold = share_threshold(np.concatenate([score_BxS[score_BxS > 0] for score_BxS in blocks()]), share)
    return np.concatenate([score_BxS >= threshold for score_BxS in blocks()])


def _largest_edges(graph: GraphData, count: int) -> np.ndarray:
    """Return True at the ``count`` largest weights of each row by size, [R, S]."""
    size_RxS, edge_RxS = np.abs(graph.adjacency_RxS), np.ones(graph.adjacency_RxS.shape, bool)
    if count < size_RxS.shape[1]:
        np.put_along_axis(edge_RxS, np.argpartition(-size_RxS, count - 1, axis=1)[:, count:], False, axis=1)
    return edge_RxS


def _connected(graph: GraphData, edge_RxS: np.ndarray) -> np.ndarray:
    """Step 3 of ``prune_each``: True where a node stays, [N]; edges of the others become False."""
    kind_N, features = graph.nodes.kind_N, graph.count(FEATURE)
    keep_N, sources = np.ones(len(kind_N), bool), edge_RxS.shape[1]
    while True:
        before = keep_N.copy()
        keep_N[:sources] &= edge_RxS.any(axis=0) | (kind_N[:sources] == TOKEN)
        # Only features have inputs that they could lose: tokens and errors have none.
        keep_N[:features] &= edge_RxS[:features].any(axis=1)
        if np.array_equal(keep_N, before):
            return keep_N
        edge_RxS[:features][~keep_N[:features]] = False
        edge_RxS[:, ~keep_N[:sources]] = False


def _cut(graph: AnyGraph, keep_N: np.ndarray) -> AnyGraph:
    """Return the graph of some of the nodes, all logits among them, with a matrix of its own."""
    rows, columns = graph.target_R[keep_N[graph.target_R]], np.flatnonzero(keep_N[: graph.adjacency_RxS.shape[1]])
    row_R = np.searchsorted(graph.target_R, rows)
    of_targets = {name: getattr(graph, name)[row_R] for name in ("value_R", "constant_R", "untraced_R")}
    adjacency_RxS = graph.adjacency_RxS[np.ix_(row_R, columns)]
    return dataclasses.replace(graph, adjacency_RxS=adjacency_RxS, nodes=graph.nodes[keep_N], **of_targets)


def source_influence(graph: GraphData, weight_K: np.ndarray | None = None) -> np.ndarray:
    """Return the influence of the graph's features, errors and tokens, in this order, float64.

    Args:
      graph: a graph.
      weight_K: weights of its logits; None: ``logit_weights``.
    """
    features, weight_K = graph.count(FEATURE), logit_weights(graph.probability_K) if weight_K is None else weight_K
    column_R = np.concatenate([np.arange(features), np.full(graph.count(LOGIT), -1)])
    weight_R = np.concatenate([np.zeros(features), weight_K.astype(np.float64)])
    adjacency_RxS = graph.adjacency_RxS[:, : graph.slice_of(TOKEN).stop]
    return influence(adjacency_RxS, graph.nodes.layer_N[graph.target_R], column_R, weight_R)


def _blocks(count: int, width: int) -> list[slice]:
    """Return slices of so many rows, each of about ``_BLOCK`` numbers."""
    size = max(1, _BLOCK // max(width, 1))
    return [slice(start, start + size) for start in range(0, count, size)]

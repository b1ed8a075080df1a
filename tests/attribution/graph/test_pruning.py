"""Influences, scores and masks, against the definitions on a square matrix and against circuit-tracer's own."""

import dataclasses

import numpy as np
import pytest
from made_graphs import make_graph

from saejax.attribution.graph import Graph, pruning
from saejax.attribution.graph.data import BIAS, ERROR, FEATURE, LOGIT, TOKEN
from saejax.errors import UserError


def layered(seed=0, **sizes) -> Graph:
    """A random graph whose edges go up, sparse, with weights of very different sizes."""
    graph, rng = make_graph(seed=seed, **sizes), np.random.default_rng(seed)
    layer_S = graph.nodes.layer_N[: graph.adjacency_RxS.shape[1]]
    up_TxS = layer_S[None, :] < graph.nodes.layer_N[graph.target_R][:, None]
    weights = graph.adjacency_RxS * np.exp(2 * rng.normal(size=up_TxS.shape)) * (rng.random(up_TxS.shape) < 0.6)
    return dataclasses.replace(graph, adjacency_RxS=np.where(up_TxS, weights, 0).astype(np.float32))


def square_of(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The edges as a square float64 matrix, those of biases left out, and the weights of the logits."""
    kind_N, count = graph.nodes.kind_N, len(graph.nodes)
    square, weight_N = np.zeros((count, count)), np.where(kind_N == LOGIT, graph.nodes.value_N, 0).astype(np.float64)
    square[graph.target_R, : graph.adjacency_RxS.shape[1]] = graph.adjacency_RxS
    square[:, kind_N == BIAS] = 0
    return square, weight_N


def shares(matrix):
    return np.abs(matrix) / np.maximum(np.abs(matrix).sum(1, keepdims=True), 1e-10)


def paths(normed, weight_N):
    total, step = np.zeros(len(normed)), weight_N
    while step.any():
        step = step @ normed
        total += step
    return total


def scores_on(square, weight_N, kind_N) -> tuple[float, float]:
    """Replacement and completeness, as circuit-tracer defines them."""
    influence_N = paths(shares(square), weight_N)
    tokens, errors = influence_N[kind_N == TOKEN].sum(), influence_N[kind_N == ERROR].sum()
    without_error_N = 1 - shares(square)[:, kind_N == ERROR].sum(1)
    return tokens / (tokens + errors), np.average(without_error_N, weights=influence_N + weight_N)


def by_definition(graph: Graph, nodes: float, edges: float):
    """Masks, cumulative shares and scores as circuit-tracer defines them, on a square float64 matrix, all sorted."""
    kind_N, (square, weight_N) = graph.nodes.kind_N, square_of(graph)

    def threshold(values, share):
        descending = -np.sort(-values)
        return descending[min(np.searchsorted(np.cumsum(descending) / values.sum(), share), len(values) - 1)]

    influence_N = paths(shares(square), weight_N)
    node_N = (influence_N >= threshold(influence_N, nodes)) | np.isin(kind_N, (TOKEN, LOGIT))
    cut = shares(np.where(node_N[:, None] & node_N[None], square, 0))
    score = cut * (paths(cut, weight_N) + weight_N)[:, None]
    edge_NxN = (score >= threshold(score.ravel(), edges)) & (score > 0)
    while True:
        before = node_N.copy()
        node_N &= edge_NxN.any(0) | np.isin(kind_N, (TOKEN, LOGIT))
        node_N &= edge_NxN.any(1) | (kind_N != FEATURE)
        edge_NxN &= node_N[:, None] & node_N[None]
        if (node_N == before).all():
            break
    return node_N, edge_NxN, influence_N, scores_on(square, weight_N, kind_N)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.9), (0.97, 0.6), (0.999, 0.9999)])
def test_masks_and_scores_are_those_of_the_definition(seed, thresholds, monkeypatch):
    graph = layered(seed, features=60, layers=4, positions=3)
    node_N, edge_NxN, influence_N, scores = by_definition(graph, *thresholds)
    monkeypatch.setattr(pruning, "_BLOCK", 1)  # a block for each row
    pruned = graph.prune(*thresholds)
    assert np.array_equal(pruned.pruning.node_N, np.flatnonzero(node_N))
    source_E, target_E, _ = pruned.edges()
    found = np.zeros_like(edge_NxN)
    found[pruned.pruning.node_N[target_E], pruned.pruning.node_N[source_E]] = True
    assert np.array_equal(found, edge_NxN)
    assert np.array_equal(pruned.nodes.value_N, graph.nodes.value_N[node_N])
    np.testing.assert_allclose(dataclasses.astuple(pruned.scores()), scores, rtol=0, atol=1e-6)
    share_N = pruning.cumulative_share(influence_N)
    order = np.argsort(-influence_N)
    assert np.allclose(share_N[order], np.cumsum(influence_N[order]) / influence_N.sum(), atol=1e-6)


@pytest.mark.parametrize("count", [0, 9, 60])
def test_scores_of_some_features_count_what_the_others_write_as_error(count):
    """By circuit-tracer's definition: a feature that is left out goes into the error of its layer and position."""
    graph = layered(features=60, layers=4, positions=3)
    ids, kind_N, (square, weight_N) = graph.ids, graph.nodes.kind_N, square_of(graph)
    kept = set(np.random.default_rng(0).permutation(60)[:count].tolist())
    for feature in set(range(60)) - kept:
        error = ids.index(f"{graph.nodes.layer_N[feature]}_-1_{graph.nodes.position_N[feature]}")
        square[:, error] += square[:, feature]
        square[feature] = square[:, feature] = 0
    found = graph.score_subgraph([ids[feature] for feature in kept])
    np.testing.assert_allclose(dataclasses.astuple(found), scores_on(square, weight_N, kind_N), rtol=0, atol=1e-6)
    if count == 60:
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(graph.scores()), abs=1e-6)
    with pytest.raises(UserError, match="'9_9_9' is no node of this graph"):
        graph.score_subgraph(["9_9_9"])


def test_what_leaves_no_feature_is_named():
    graph = layered(features=40)
    errors_RxS = graph.adjacency_RxS.copy()
    errors_RxS[:, graph.slice_of(ERROR)] = 1e3 * (1 + np.abs(errors_RxS[:, graph.slice_of(ERROR)]))
    drowned = dataclasses.replace(graph, adjacency_RxS=errors_RxS)
    for each, thresholds, name in (
        (drowned, (1.0, 1.0, 1, 0.0), "top_edges"),
        (graph, (1.0, 1.0, 0, 1e6), "min_weight"),
        (graph, (1.0, 0.0, 0, 0.0), "edges"),
        (graph, (0.0, 1.0, 0, 0.0), "nodes"),
        (dataclasses.replace(graph, adjacency_RxS=0 * graph.adjacency_RxS), (1.0, 1.0, 0, 0.0), ""),
    ):
        assert each.prune(*thresholds).count(FEATURE) == 0, name
        assert pruning.emptying_threshold(each, *thresholds) == name


def test_of_each_target_only_the_largest_edges_stay():
    graph = layered(features=40)
    pruned = graph.prune(1.0, 1.0, top_edges=3)
    size_RxS = np.abs(graph.adjacency_RxS[:, graph.nodes.kind_N[: graph.adjacency_RxS.shape[1]] != BIAS])
    row_of = {node: row for row, node in enumerate(graph.target_R.tolist())}
    edges = list(zip(*(part.tolist() for part in pruned.edges()), strict=True))
    assert len(edges) > 20 and min(weight for *_, weight in edges) < 0
    for _, target, weight in edges:
        assert (size_RxS[row_of[int(pruned.pruning.node_N[target])]] > abs(weight)).sum() < 3


def test_edges_smaller_than_the_least_weight_go():
    graph = layered(features=40)
    least = float(np.median(np.abs(graph.edges()[2])))
    pruned = graph.prune(1.0, 1.0, min_weight=least)
    ids = np.array(graph.ids)
    large = [
        (ids[source], ids[target])
        for source, target, weight in zip(*graph.edges(), strict=True)
        if abs(weight) >= least and {ids[source], ids[target]} <= set(pruned.ids)
    ]
    source_E, target_E, weight_E = pruned.edges()
    ids = np.array(pruned.ids)
    assert sorted(zip(ids[source_E], ids[target_E], strict=True)) == sorted(large)
    assert np.abs(weight_E).min() >= least and len(large) > 20


def test_edges_of_supernodes_are_sums_of_those_of_their_nodes():
    graph = layered(features=40)
    ids, rng = graph.ids, np.random.default_rng(2)
    groups = {name: [ids[node] for node in rng.choice(len(ids), 9, replace=False)] for name in ("a", "b", "c")}
    source_E, target_E, weight_E = graph.edges()
    expected = [
        [
            sum(
                weight
                for source, target, weight in zip(source_E, target_E, weight_E.astype(float), strict=True)
                if ids[source] in groups[sources] and ids[target] in groups[targets]
            )
            for sources in groups
        ]
        for targets in groups
    ]
    np.testing.assert_allclose(graph.supernodes(groups), expected, rtol=0, atol=1e-12)
    assert np.abs(expected).max() > 0.01 and graph.supernodes({}).shape == (0, 0)
    with pytest.raises(UserError, match="'a' holds 'nothing', which is no node of"):
        graph.supernodes(dict(a=["nothing"]))
    with pytest.raises(UserError, match="'a' holds no node"):
        graph.supernodes(dict(a=[]))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.98, 0.9999])
def test_values_at_or_above_the_threshold_have_the_share(share):
    values = np.exp(4 * np.random.default_rng(1).normal(size=(50, 100))).astype(np.float32)
    values[::3], values[1] = 0, values[1, 1]
    threshold, total = pruning.share_threshold(values, share), values.sum(dtype=np.float64)
    assert threshold in values
    assert values[values >= threshold].sum(dtype=np.float64) >= share * total * (1 - 1e-12)  # rounding
    assert values[values > threshold].sum(dtype=np.float64) <= share * total
    assert pruning.share_threshold(values, 1.0) <= threshold
    assert pruning.share_threshold(np.zeros(3, np.float32), share) == np.inf


def test_what_cannot_be_pruned_is_refused():
    graph = layered()
    with pytest.raises(UserError, match="nodes is 1.5: expected a share"):
        graph.prune(nodes=1.5)
    with pytest.raises(UserError, match="min_weight is -0.1: expected a size"):
        graph.prune(min_weight=-0.1)
    for top_edges in (-1, 2.5):
        with pytest.raises(UserError, match=f"top_edges is {top_edges}: expected a number of edges"):
            graph.prune(top_edges=top_edges)
    with pytest.raises(UserError, match="pruned already"):
        graph.prune().prune()
    without_edges = dataclasses.replace(graph, adjacency_RxS=np.zeros_like(graph.adjacency_RxS))
    assert set(without_edges.prune().nodes.kind_N) == {TOKEN, LOGIT}


@pytest.mark.parametrize("chance", [1e-9, 1e-11, 1e-30, 1e-44, 0.0])
def test_scores_and_masks_do_not_depend_on_how_probable_the_target_is(chance):
    """Influences scale with it: none may become so small that it counts for less, or for nothing."""

    def of(weight):
        graph = layered()
        graph.nodes.value_N[graph.slice_of(LOGIT)] = weight
        return graph

    probable, improbable = of(0.5), of(chance)
    assert improbable.scores().replacement == pytest.approx(probable.scores().replacement, rel=1e-6)
    assert improbable.scores().completeness == pytest.approx(probable.scores().completeness, rel=1e-6)
    assert 0 < probable.scores().replacement < 1
    kept, wanted = improbable.prune(0.7, 0.9), probable.prune(0.7, 0.9)
    assert np.array_equal(kept.pruning.node_N, wanted.pruning.node_N)
    assert np.array_equal(kept.adjacency_RxS, wanted.adjacency_RxS)
    np.testing.assert_allclose(kept.pruning.influence_N, wanted.pruning.influence_N, rtol=1e-5)


def test_scores_do_not_depend_on_the_unit_of_a_target():
    graph = layered()
    tiny = dataclasses.replace(graph, adjacency_RxS=graph.adjacency_RxS * np.float32(2.0**-60))
    assert tiny.scores() == graph.scores()
    assert np.array_equal(tiny.prune(0.7, 0.9).pruning.node_N, graph.prune(0.7, 0.9).pruning.node_N)

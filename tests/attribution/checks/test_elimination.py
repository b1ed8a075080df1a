"""The order of elimination: its linear model against loops over edges, and chains that only stand whole."""

import numpy as np
import pytest
from made_transcoders import IDS, made_set

from saejax.attribution.graph.elimination import LinearModel, elimination_order
from saejax.attribution.graph.nodes import FEATURE
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.prompt import trace_prompt


@pytest.fixture(scope="module")
def graph(lm):
    """All active features have a node."""
    return trace_prompt(lm, LayerTranscoders.of(made_set(lm)), IDS, targets=[(7, 11)]).graph


def by_loops(model, left, less=-1):
    """The readouts with the features that are left, edge by edge; of one of them others get a millionth less."""
    part = {}
    for feature in left.tolist():  # in the order of layers
        given = model.fixed_F[feature] + sum(float(model.edges_FxF[feature, s]) * part[s] for s in part)
        part[feature] = max(given, 0.0) / model.activation_F[feature] * (1 - 1e-6 * (feature == less))
    return part, sum(model.direct_F[s] * part[s] for s in part)


def test_with_all_features_effects_sum_all_signed_paths(graph):
    """Paths of 1, 2, 3, ... edges one after the other, in fp64, until there are no longer ones."""
    count, A_RxS = graph.count(FEATURE), graph.adjacency_RxS[:, : graph.count(FEATURE)].astype(np.float64)
    share_FxF = A_RxS[:count] / graph.nodes.value_N[:count, None]
    path_F, wanted_F, lengths = A_RxS[count], np.zeros(count), 0
    while path_F.any():
        wanted_F, path_F, lengths = wanted_F + path_F, path_F @ share_FxF, lengths + 1
    assert lengths == 4  # to the answer, and through features of one to three layers above
    found = LinearModel.of(graph, np.ones(1)).effects(np.arange(count))
    np.testing.assert_allclose(found, wanted_F, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted_F - A_RxS[count]).max() > 0.01 * np.abs(wanted_F).max()


def test_effects_of_what_is_left_are_gradients_of_a_run_edge_by_edge(graph):
    """A feature's effect is x times the gradient: a millionth of it taken away costs a millionth of the effect."""
    rng, count = np.random.default_rng(0), graph.count(FEATURE)
    model, left = LinearModel.of(graph, np.ones(1)), np.sort(rng.choice(count, count // 2, replace=False))
    effect_L, (part, answer) = model.effects(left), by_loops(model, left)
    assert 0 < sum(value == 0 for value in part.values()) < len(left), "some are silent"
    for place in rng.choice(len(left), 12, replace=False):
        _, moved = by_loops(model, left, less=left[place])
        assert (answer - moved) * 1e6 == pytest.approx(effect_L[place], rel=1e-3, abs=1e-5)


def test_all_features_are_ordered_and_those_against_the_answer_go_first(graph):
    order = elimination_order(graph, np.ones(1))
    assert sorted(order.tolist()) == list(range(graph.count(FEATURE)))
    effect_F = LinearModel.of(graph, np.ones(1)).effects(np.arange(len(order)))
    assert effect_F[order[-10:]].max() < 0 < effect_F[order[:10]].mean()
    turned = elimination_order(graph, -np.ones(1))
    assert np.corrcoef(np.argsort(order), np.argsort(turned))[0, 1] < -0.5


def test_what_feeds_a_feature_that_is_gone_is_worth_nothing():
    """Features 0 and 1 feed 2 and 3: without 0 feature 2 is silent, without 3 feature 1 has what it does by itself."""
    edges_FxF = np.zeros((4, 4))
    edges_FxF[2, 0], edges_FxF[3, 1] = 1.0, 0.9
    fixed_F, direct_F = np.array([1.0, 1.0, 0.0, 0.1]), np.array([0.0, 0.5, 2.0, -3.0])
    model = LinearModel(edges_FxF, np.ones(4), fixed_F, direct_F, np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(model.effects(np.arange(4)), [2.0, 0.5 - 2.7, 2.0, -3.0])
    np.testing.assert_allclose(model.effects(np.array([0, 1, 2])), [2.0, 0.5, 2.0])
    np.testing.assert_allclose(model.effects(np.array([1, 2])), [0.5, 0.0])

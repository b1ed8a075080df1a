"""Circuits of equal numbers of features in several orders: the orders, what is run, and the scores."""

import numpy as np
import pytest
from made_transcoders import IDS, made_set

from saejax.attribution.checks import kept
from saejax.attribution.checks.circuit_runs import run_circuits
from saejax.attribution.checks.kept import DRAWS, ORDERS, SCORES, KeptReadouts, compare_orders, keep_features
from saejax.attribution.graph.elimination import elimination_order
from saejax.attribution.graph.nodes import FEATURE
from saejax.attribution.graph.pruning import source_influence
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.report_kept import _at
from saejax.attribution.results import KeptResults
from saejax.attribution.trace.prompt import trace_prompt
from saejax.causal.faithfulness import SHARES
from saejax.page.tables import percent


@pytest.fixture(scope="module")
def own(lm):
    """A graph in which some of the active features have no node."""
    return trace_prompt(lm, LayerTranscoders.of(made_set(lm)), IDS, targets=[(7, 11)], max_features=90)


def test_as_many_features_are_kept_in_each_order(own, monkeypatch):
    seen = []

    def run(replacement, circuits, readouts):
        seen.extend(circuits)
        return run_circuits(replacement, circuits, readouts)

    monkeypatch.setattr(kept, "run_circuits", run)
    graph, replacement, readouts = own
    found = keep_features(replacement, graph, readouts, 456)
    count, traced = len(replacement.active), graph.count(FEATURE)
    assert found.active == count > traced == 90 and all(circuit.errors_LxP.all() for circuit in seen)
    sizes = [int(circuit.features_A.sum()) for circuit in seen]
    each = [int(np.ceil(share * count)) for share in SHARES[:-1]]
    assert sizes == [0, count, *each * (len(ORDERS) + DRAWS)]
    features = graph.nodes[graph.slice_of(FEATURE)]
    place_F = replacement.active.places(features.layer_N, features.position_N, features.index_N)
    fifth = [circuit.features_A[place_F] for circuit in seen[2 + len(each) - 2 :: len(each)]]  # of every order
    by_elimination = elimination_order(graph, np.ones(1))
    assert set(by_elimination[: fifth[0].sum()].tolist()) == set(np.flatnonzero(fifth[0]).tolist())
    half = fifth[1].sum() // 2  # the first half of each order is in the mixed one
    assert set(by_elimination[:half].tolist()) <= set(np.flatnonzero(fifth[1]).tolist())
    influence_F = source_influence(graph)[:traced]
    assert set(np.argsort(-influence_F)[:half].tolist()) <= set(np.flatnonzero(fifth[1]).tolist())
    pruned = [graph.prune(share, 1.0).pruning.node_N for share in np.linspace(0.3, 0.9, 13)]  # by the same rule
    by_influence = [set(node_N[node_N < traced].tolist()) for node_N in pruned]
    assert any(3 < len(one) <= each[-2] for one in by_influence)
    for one in by_influence:
        assert len(one) > each[-2] or one <= set(np.flatnonzero(fifth[2]).tolist())
    assert not np.array_equal(fifth[0], fifth[2])
    # Nothing kept is below everything kept, which is the model.
    np.testing.assert_allclose(found.readout_ExX[:, -1], readouts.value_K[0], atol=1e-5)
    assert np.ptp(found.readout_ExX[:, 0]) == 0 and abs(found.readout_ExX[0, 0] - readouts.value_K[0]) > 1e-2


def made_up(curves, prompts=6, seed=0):
    """Readouts of prompts whose models differ in scale; ``curves`` are faithfulness of each order."""
    rng = np.random.default_rng(seed)
    scale_P = rng.uniform(1.0, 3.0, prompts)
    return [
        KeptReadouts(2.0 + scale * np.concatenate([np.zeros((len(curves), 1)), curves], 1), 50) for scale in scale_P
    ]


def test_scores_are_areas_and_their_difference_is_paired():
    shares = np.array(SHARES)
    better, worse, random = shares**0.25, shares**0.5, shares
    curves = np.stack([better, better, worse, *[random] * DRAWS])
    found = compare_orders(made_up(curves), ["a"] * 6, 3)
    assert found.reason is None and found.prompts == 6 and found.features[-1] == 50
    for score, height in (("cpr", lambda f: f), ("cmd", lambda f: np.abs(f - 1))):
        areas = [np.trapezoid(height(one), shares) for one in (better, worse, random)]
        own = found.scores[score]
        assert own.effect.mean == pytest.approx(areas[0]) and own.influence.mean == pytest.approx(areas[1])
        assert [own.random.mean, own.random.low] == pytest.approx([areas[2]] * 2)
        # Every prompt has the same curve, so that the intervals have no width.
        assert [own.difference.low, own.difference.high] == pytest.approx([areas[0] - areas[1]] * 2)
    assert found.faithfulness["influence"] == pytest.approx(worse.tolist())
    rng = np.random.default_rng(1)
    noisy = [
        KeptReadouts(one.readout_ExX + rng.normal(size=one.readout_ExX.shape) * 0.1, 50) for one in made_up(curves)
    ]
    own = compare_orders(noisy, list("abcdef"), 3).scores["cpr"]
    assert own.difference.low < own.difference.mean < own.difference.high


def test_where_there_is_nothing_to_compare():
    curves = np.stack([np.array(SHARES)] * (len(ORDERS) + DRAWS))
    assert "one prompt" in compare_orders(made_up(curves, 1), ["a"], 3).reason
    nothing = compare_orders([KeptReadouts(0 * one.readout_ExX, 5) for one in made_up(curves)], ["a"] * 6, 3)
    assert "does not clearly cost" in nothing.reason and not nothing.scores and nothing.model == 0


@pytest.mark.parametrize("names", [("elimination", "mixed"), ("effect", "size")])
def test_the_report_reads_orders_by_their_earlier_names_too(names):
    curve = tuple(float(share) for share in SHARES)
    lines = dict.fromkeys(names, curve) | dict(influence=(0.0,) * len(SHARES))
    found = KeptResults(2, SHARES, (1,) * len(SHARES), lines, {}, 1.0, 0.0, None)
    assert {_at(found, SCORES[score], 0.2) for score in ("cpr", "cmd")} == {percent(0.2)}
    assert _at(found, "influence", 0.2) == percent(0.0)

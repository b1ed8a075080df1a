"""Rows of changes made of a graph's features: against sums of edges, and against hooks in PyTorch."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from dense_reference import EditedModel
from made_transcoders import IDS, made_set

from saejax.attribution.checks import matched, scale, set_to
from saejax.attribution.graph.nodes import Nodes
from saejax.attribution.local import edits
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.prompt import trace_prompt
from saejax.errors import UserError


@pytest.fixture(scope="module")
def setting(lm):
    """A prompt's local model, its readouts and graph, and the model in PyTorch."""
    transcoders = made_set(lm, kind="topk")
    graph, here, readouts = trace_prompt(lm, LayerTranscoders.of(transcoders), IDS, targets=[7, (9, 11)])
    edited = EditedModel(lm, transcoders)
    return SimpleNamespace(here=here, readouts=readouts, graph=graph, edited=edited, transcoders=transcoders)


def readouts_of(logits_V):
    return np.array([logits_V[7] - logits_V.mean(), logits_V[9] - logits_V[11]])


def features_of(graph, nodes) -> Nodes:
    return graph.nodes[np.asarray(nodes, np.int64)]


def some_features(setting, seed=1, count=9) -> Nodes:
    """Some features of all layers."""
    chosen = np.random.default_rng(seed).permutation(len(setting.here.active))[:count]
    return features_of(setting.graph, np.sort(chosen))


def keys_of(features: Nodes) -> set[tuple[int, int, int]]:
    """Layer, position and number of some features."""
    return set(zip(features.layer_N.tolist(), features.position_N.tolist(), features.index_N.tolist()))


def test_with_all_held_ablation_takes_the_sum_of_the_edges_away(setting):
    graph, here = setting.graph, setting.here
    groups = [np.arange(0, 40, 3), np.arange(len(here.active)), np.array([7]), np.arange(5, 60, 6), np.arange(9)]
    factor_R = np.array([0.0, 0.0, 0.0, -1.0, 2.0])
    rows = [scale(features_of(graph, group), factor) for group, factor in zip(groups, factor_R, strict=True)]
    every_A = np.arange(len(here.active))
    changed = here.run(rows, "all", readouts=setting.readouts, features=every_A)
    after_RxT = np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1).astype(np.float64)
    moved_RxT = after_RxT - np.concatenate([here.active.value_A, setting.readouts.value_K])
    edges_RxT = np.stack([graph.adjacency_RxS[:, group].sum(axis=1, dtype=np.float64) for group in groups])
    assert np.abs(moved_RxT - (factor_R[:, None] - 1) * edges_RxT).max() < 1e-5 * np.abs(edges_RxT).max()
    size_K = np.abs(graph.adjacency_RxS[-2:, : len(every_A)]).sum(axis=1)  # of all features, the parts of each logit
    assert (np.abs(moved_RxT[1, -2:] + edges_RxT[1, -2:]) < 1e-5 * size_K).all() and (size_K > 0.1).all()


def test_with_nothing_held_the_model_runs_as_with_hooks_in_torch(setting):
    group = some_features(setting)
    rows = [scale(group, 0.0), scale(group, -1.5), set_to(group, np.linspace(0, 2, len(group))), scale(group, 1.0)]
    ours_RxK = setting.here.run(rows, readouts=setting.readouts).readout_RxK
    for row, ours_K in zip(rows[:3], ours_RxK[:3], strict=True):
        wanted_K = readouts_of(setting.edited.run(IDS, row)[0])
        assert np.abs(wanted_K - setting.readouts.value_K).max() > 0.01
        np.testing.assert_allclose(ours_K, wanted_K, atol=2e-5)
    np.testing.assert_allclose(ours_RxK[3], setting.readouts.value_K, atol=1e-5)


def test_above_the_last_held_layer_the_model_runs_freely(setting):
    here, row, until = setting.here, scale(some_features(setting, 2, 24), 0.0), 2
    assert {change.layer for change in row} == {0, 1, 2, 3}
    ways = {u: here.run([row], "all", readouts=setting.readouts, freeze_until=u).readout_RxK[0] for u in range(5)}
    ways |= {freeze: here.run([row], freeze, readouts=setting.readouts).readout_RxK[0] for freeze in ("none", "all")}
    np.testing.assert_array_equal(ways[0], ways["none"])
    np.testing.assert_allclose(ways[1], ways["none"], atol=5e-6)  # nothing has changed when layer 0 runs
    assert all(np.abs(ways[u] - ways[v]).max() > 1e-3 for u, v in ((1, 2), (2, 3), (3, 4), (4, "all")))
    # The stream that enters layer 2 is the prompt's and what all changes below add to it.
    below, above = ([c for c in row if (c.layer < until) == is_below] for is_below in (True, False))
    rows = [np.asarray(setting.transcoders[c.layer].W_dec_FxD[...])[c.feature] for c in below]
    old = [here.active.value_A[here.active.index_of[c.layer, c.position, c.feature]] for c in below]
    vector_ExD = np.stack([(c.value - value) * row for c, value, row in zip(below, old, rows, strict=True)])

    def added(layer: int) -> np.ndarray:
        value_1xTxD = np.zeros((1, *here.stream_LxTxD.shape[1:]), np.float32)
        for change, vector_D in zip(below, vector_ExD, strict=True):
            value_1xTxD[0, change.position] += vector_D * (change.layer + 1 == layer)
        return value_1xTxD

    change_TxD = next(change[0] for layer, change, _ in here.pushforward(added) if layer == until)
    entering_TxD = np.asarray(here.stream_LxTxD[until] + change_TxD, np.float64)[: len(IDS)]
    logits_V, _ = setting.edited.run(IDS, above, (until, entering_TxD))
    np.testing.assert_allclose(ways[until], readouts_of(logits_V), atol=2e-5)


def test_other_sets_have_as_many_features_of_the_same_layers_and_positions(setting):
    group = some_features(setting)
    controls = matched(setting.here, group, 3)
    members, every = keys_of(group), keys_of(features_of(setting.graph, np.arange(len(setting.here.active))))
    for control in controls:
        keys = keys_of(control)
        assert len(keys) == len(group) and not keys & members
        assert np.array_equal(np.sort(control.layer_N), np.sort(group.layer_N))
        counts, taken, free = (Counter(key[:2] for key in part) for part in (keys, members, every))
        assert all(counts[at] >= min(taken[at], free[at] - taken[at]) for at in taken)
    again, reseeded = matched(setting.here, group, 3), matched(setting.here, group, 3, 1)
    assert all(np.array_equal(a.index_N, b.index_N) for a, b in zip(controls, again))
    assert any(not np.array_equal(a.index_N, b.index_N) for a, b in zip(controls, reseeded))


def test_random_sets_are_all_different(setting):
    active = setting.here.active
    at_N = np.stack([active.layer_A, active.position_A], axis=1)
    place = next(n for n, at in enumerate(at_N) if 2 < (at_N == at).all(axis=1).sum() < 9)
    sets = [keys_of(one) for one in matched(setting.here, features_of(setting.graph, [place]), 99)]
    keys = list(zip(active.layer_A.tolist(), active.position_A.tolist(), active.feature_A.tolist(), strict=True))
    removed = keys.pop(place)
    near = [{key} for key in keys if key[:2] == removed[:2]]  # at the same position: they come first
    assert all(one in sets[: len(near)] for one in near) and len(sets) == sum(key[0] == removed[0] for key in keys)
    assert len(set(map(frozenset, sets))) == len(sets)


def test_thousands_of_rows_in_one_call_are_those_of_single_calls(setting, monkeypatch):
    here, count = setting.here, len(setting.here.active)
    rows = [scale(features_of(setting.graph, [node % count]), 0.0) for node in range(2048)]
    monkeypatch.setattr(edits, "CHUNK", 2**18)  # 512 rows at once
    together_RxK = here.run(rows, readouts=setting.readouts).readout_RxK
    assert len(np.unique(together_RxK[:count, 0])) > count / 2
    some = [0, 511, 512, 1999]
    alone_RxK = here.run([rows[number] for number in some], readouts=setting.readouts).readout_RxK
    np.testing.assert_allclose(together_RxK[some], alone_RxK, atol=5e-6)


def test_bad_input(setting):
    graph, here = setting.graph, setting.here
    with pytest.raises(UserError, match="cannot be set to nan"):
        here.run([scale(some_features(setting), float("nan"))], readouts=setting.readouts)
    with pytest.raises(UserError, match="freeze_until is 5: expected a layer, 0 to 3, or 4"):
        here.run([], "all", readouts=setting.readouts, freeze_until=5)
    with pytest.raises(UserError, match="other active features: expected"):
        matched(here, features_of(graph, np.arange(len(here.active))), 1)
    assert scale(some_features(setting, count=0), 0.0) == []
    assert here.run([], readouts=setting.readouts).readout_RxK.size == 0

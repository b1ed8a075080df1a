"""The local model of a prompt: runs with edits against hooks in PyTorch, its linear directions, parts run alone."""

import contextlib
import copy
import dataclasses
from collections import Counter
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from dense_reference import EditedModel
from graph_checks import double, push_up
from made_transcoders import IDS, made_set

import saejax
from saejax.attribution.checks import matched, scale, set_to
from saejax.attribution.graph.data import Nodes
from saejax.attribution.local import dictionaries, edits, model
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.local.edits import Change
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.state import FREEZE_MODES, embed
from saejax.attribution.trace.prompt import trace_prompt
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.tokens import Tokens


# A set that keeps all above 0 takes no way of its own: the slow suite has it.
@pytest.fixture(scope="module", params=[pytest.param("standard", marks=pytest.mark.slow), "topk", "skip"])
def traced(lm, request):
    """A replacement model, its transcoders, its readouts (two logits and a difference), and the graph."""
    skip = request.param == "skip"
    transcoders = made_set(lm, kind="jumprelu" if skip else request.param, skip=skip)
    graph, local, readouts = trace_prompt(lm, LayerTranscoders.of(transcoders), IDS, targets=[7, 9, (7, 11)])
    return local, transcoders, readouts, graph


@pytest.fixture(scope="module")
def edited(traced, lm):
    return EditedModel(lm, traced[1])


def readouts_of(logits_V):
    """The three readouts of some logits."""
    mean = logits_V.mean()
    return [logits_V[7] - mean, logits_V[9] - mean, logits_V[7] - logits_V[11]]


def some_features(traced, seed=1, count=9) -> Nodes:
    """Some features of all layers."""
    chosen = np.random.default_rng(seed).permutation(len(traced[0].active))[:count]
    return traced[3].nodes[np.sort(chosen)]


def places(active, chosen) -> list[tuple[int, int, int]]:
    """Layer, position and number of some active features."""
    return list(zip(*(getattr(active, f"{name}_A")[chosen].tolist() for name in ("layer", "position", "feature"))))


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_pushing_a_source_up_gives_what_pulling_a_target_down_does(traced):
    """A direction of the stream that enters layer 2 reads what the features below add."""
    local, transcoders, readouts, graph = traced
    active = local.active
    below = np.flatnonzero((active.layer_A < 2) & (active.position_A <= 4))
    chosen = below[:: max(len(below) // 8, 1)]
    written = [np.asarray(transcoders[layer].W_dec_FxD[...])[f] for layer, _, f in places(active, chosen)]
    vector_SxD = active.value_A[chosen, None] * np.stack(written)

    def added(layer: int) -> np.ndarray:
        here = np.flatnonzero(active.layer_A[chosen] + 1 == layer)
        value_SxTxD = np.zeros((len(chosen), *local.stream_LxTxD.shape[1:]), np.float32)
        value_SxTxD[here, active.position_A[chosen][here]] = vector_SxD[here]
        return value_SxTxD

    axis_D = np.eye(local.model.config.d_model, dtype=np.float32)[3]
    found_S = push_up(local, added, 2)[:, 4, 3]
    wanted_S = local.pullback(np.array([2]), np.array([4]), axis_D[None], in_stream=True)[0, chosen]
    np.testing.assert_allclose(found_S, wanted_S, atol=1e-5 * np.abs(wanted_S).max())
    assert np.abs(wanted_S).max() > 1e-3
    top_K, last_K = np.full(3, 4), np.full(3, len(IDS) - 1)
    pulled_RxS = local.pullback(top_K, last_K, readouts.vector_KxD, in_stream=True)
    np.testing.assert_allclose(pulled_RxS, graph.adjacency_RxS[-3:], atol=1e-6)


def test_a_prompt_begins_as_the_texts_of_the_training(lm, caplog):
    """The tokenizer puts nothing in front, and has no BOS token but one that ends texts."""
    made, ids = made_set(lm), lm.tokenize(["The cat near"], "never").ids_BxT[0].tolist()
    told = "'<end>' is put in front of texts, as the dictionary was trained (bos=always) and unlike the tokenizer"
    for bos, fronts in (("always", 1), ("never", 0), ("auto", 0)):
        transcoders = [each.with_config(dataclasses.replace(each.config, bos=bos)) for each in made]
        caplog.clear()
        assert LocalModel(lm, transcoders, "The cat near").ids_P.tolist() == [0] * fronts + ids
        assert LocalModel(lm, transcoders, "<end>The cat near").ids_P.tolist() == [0, *ids]
        assert caplog.messages == [told] * 2 * fronts


def some_rows(local, rng):
    """Rows of one change and of three, of active features and of others."""
    rows = [[Change(1, 3, 0, 2.5), Change(0, 3, 1, 1.5), Change(2, 5, 2, 0.0)]]
    for count in (1, 1, 3, 3):
        chosen = places(local.active, rng.permutation(len(local.active))[:count])
        rows.append([Change(*place, float(v)) for place, v in zip(chosen, rng.normal(1.0, 1.0, count), strict=True)])
    return rows


def test_the_model_runs_on_as_with_hooks_in_torch(traced, edited):
    """Also with a feature at every position, of which the first has the activation 0 before, and with many features."""
    local, _, readouts, _ = traced
    rows, group = some_rows(local, np.random.default_rng(1)), some_features(traced)
    rows += [[Change(1, slice(None), 3, 2.0)], [], scale(group, 0.0), scale(group, -1.5)]
    rows.append(set_to(group, np.linspace(0, 2, len(group))))
    ours = local.run(rows, readouts=readouts)
    for row, ours_K, ours_V in zip(rows, ours.readout_RxK, ours.logits_RxV, strict=True):
        logits_V, _ = edited.run(IDS, row)
        np.testing.assert_allclose(ours_K, readouts_of(logits_V), atol=2e-5)
        np.testing.assert_allclose(ours_V, logits_V, atol=2e-5)
    assert (np.abs(ours.readout_RxK[-3:] - readouts.value_K).max(axis=1) > 0.01).all()
    np.testing.assert_allclose(saejax.intervene(local, rows), ours.logits_RxV, atol=1e-6)
    np.testing.assert_allclose(local.run([[]], readouts=readouts).logits_RxV[0], local.logits_V)


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_chunks_share_encoders_and_changes_positions(traced, monkeypatch):
    """Where one encoder alone fits into memory, each is read once for all rows, and encodes a position once."""
    local, _, readouts, _ = traced
    keys, loaded, encoded = [(layer, 3, feature) for layer in range(4) for feature in range(20)], [], []
    rows = [[Change(*key, 1 + number / 8) for key in keys] for number in range(24)]
    some = [0, 7, 8, 23]
    alone_RxK = np.concatenate([local.run([rows[number]], readouts=readouts).readout_RxK for number in some])
    load, encode = LayerTranscoders._encoder_on_host, edits._encode_places

    def load_encoder(self, layer):
        loaded.append(layer)
        return load(self, layer)

    def encode_places(encoder, read_RxTxD, row_N, *rest):
        encoded.append(len(row_N))
        return encode(encoder, read_RxTxD, row_N, *rest)

    monkeypatch.setattr(LayerTranscoders, "_encoder_on_host", load_encoder)
    monkeypatch.setattr(edits, "_encode_places", encode_places)
    monkeypatch.setattr(edits, "CHUNK", 1)  # eight rows at once
    monkeypatch.setattr(dictionaries, "free_bytes", lambda mesh: 0)
    local.dictionaries.forget()
    together_RxK = local.run(rows, readouts=readouts).readout_RxK
    np.testing.assert_allclose(together_RxK[some], alone_RxK, atol=5e-6)
    assert len(np.unique(together_RxK[:, 0])) == 24
    assert loaded == [0, 1, 2, 3] and encoded == [16] * 12  # the least size, where 160 features are changed
    monkeypatch.setattr(model, "TOGETHER", 1)  # each chunk goes up alone
    np.testing.assert_array_equal(local.run(rows, readouts=readouts).readout_RxK, together_RxK)


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_readouts_and_layers_without_changes_cost_nothing(traced):
    """The columns of the unembedding are picked once, and where nothing is changed nothing is added."""
    local, _, readouts, _ = traced
    rows, params = some_rows(local, np.random.default_rng(3)), dict(local.frozen.params)
    wanted_RxK = local.run(rows, readouts=readouts).readout_RxK
    for name in ("embed_VxD", "unembed_DxV"):
        params.pop(name, None)
    without = copy.copy(local)
    without.frozen = dataclasses.replace(local.frozen, params=params)
    np.testing.assert_allclose(without.run(rows, readouts=readouts, logits=False).readout_RxK, wanted_RxK, atol=5e-6)
    ((_, plan),) = edits.plan_edits(local, [[Change(1, 3, 0, 2.5)]])
    nothing_RxTxD = jnp.zeros((plan.rows, *local.stream_LxTxD.shape[1:]))
    added = [plan.difference(layer, "none", nothing_RxTxD) is not None for layer in range(3)]
    assert added == [False, True, False]


# Statement 11 of WORKSPACE.md, what must hold.
@pytest.mark.parametrize("freeze", FREEZE_MODES)
def test_a_feature_set_to_its_own_value_changes_nothing(traced, freeze):
    local, _, readouts, _ = traced
    active = local.active
    chosen = [0, len(active) // 2, len(active) - 1]
    same = [Change(*place, float(active.value_A[a])) for a, place in zip(chosen, places(active, chosen), strict=True)]
    changed = local.run([same, []], freeze, readouts=readouts, features=range(len(active)))
    np.testing.assert_allclose(changed.readout_RxK, np.tile(readouts.value_K, (2, 1)), atol=5e-6)
    np.testing.assert_allclose(changed.feature_RxJ, np.tile(active.value_A, (2, 1)), atol=5e-6)
    assert (local.run([[]], freeze, readouts=readouts, features=[0]).readout_RxK == readouts.value_K).all()


def test_with_all_held_a_change_is_its_edge(traced):
    local, _, readouts, graph = traced
    doubling = double(local, graph, readouts, 12)
    assert doubling.results.held_error < 3e-6
    assert np.abs(doubling.edge_ExR).max() > 0.01
    assert np.abs(doubling.free_ExR - doubling.edge_ExR).max() > 1e-3  # norms, attention and MLPs do react
    assert 0 < doubling.results.correlation <= 1


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_with_all_held_ablation_takes_the_sum_of_the_edges_away(traced):
    here, _, readouts, graph = traced
    groups = [np.arange(0, 40, 3), np.arange(len(here.active)), np.array([7]), np.arange(5, 60, 6), np.arange(9)]
    factor_R = np.array([0.0, 0.0, 0.0, -1.0, 2.0])
    rows = [scale(graph.nodes[group], factor) for group, factor in zip(groups, factor_R, strict=True)]
    every_A = np.arange(len(here.active))
    changed = here.run(rows, "all", readouts=readouts, features=every_A)
    after_RxT = np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1).astype(np.float64)
    moved_RxT = after_RxT - np.concatenate([here.active.value_A, readouts.value_K])
    edges_RxT = np.stack([graph.adjacency_RxS[:, group].sum(axis=1, dtype=np.float64) for group in groups])
    assert np.abs(moved_RxT - (factor_R[:, None] - 1) * edges_RxT).max() < 1e-5 * np.abs(edges_RxT).max()
    size_K = np.abs(graph.adjacency_RxS[-3:, : len(every_A)]).sum(axis=1)  # of all features, the parts of each logit
    assert (np.abs(moved_RxT[1, -3:] + edges_RxT[1, -3:]) < 1e-5 * size_K).all() and (size_K > 0.1).all()


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_above_the_last_held_layer_the_model_runs_freely(traced, edited):
    (here, transcoders, readouts, _), row, until = traced, scale(some_features(traced, 2, 24), 0.0), 2
    assert {change.layer for change in row} == {0, 1, 2, 3}
    ways = {u: here.run([row], "all", readouts=readouts, freeze_until=u).readout_RxK[0] for u in range(5)}
    ways |= {freeze: here.run([row], freeze, readouts=readouts).readout_RxK[0] for freeze in ("none", "all")}
    np.testing.assert_array_equal(ways[0], ways["none"])
    np.testing.assert_allclose(ways[1], ways["none"], atol=5e-6)  # nothing has changed when layer 0 runs
    assert all(np.abs(ways[u] - ways[v]).max() > 1e-3 for u, v in ((1, 2), (2, 3), (3, 4), (4, "all")))
    # The stream that enters layer 2 is the prompt's and what all changes below add to it.
    below, above = ([c for c in row if (c.layer < until) == is_below] for is_below in (True, False))
    rows = [np.asarray(transcoders[c.layer].W_dec_FxD[...])[c.feature] for c in below]
    old = [here.active.value_A[here.active.index_of[c.layer, c.position, c.feature]] for c in below]
    vector_ExD = np.stack([(c.value - value) * row for c, value, row in zip(below, old, rows, strict=True)])

    def added(layer: int) -> np.ndarray:
        value_1xTxD = np.zeros((1, *here.stream_LxTxD.shape[1:]), np.float32)
        for change, vector_D in zip(below, vector_ExD, strict=True):
            value_1xTxD[0, change.position] += vector_D * (change.layer + 1 == layer)
        return value_1xTxD

    change_TxD = push_up(here, added, until)[0]
    entering_TxD = np.asarray(here.stream_LxTxD[until] + change_TxD, np.float64)[: len(IDS)]
    logits_V, _ = edited.run(IDS, above, (until, entering_TxD))
    np.testing.assert_allclose(ways[until], readouts_of(logits_V), atol=2e-5)


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_attention_can_be_held_alone(traced):
    local, _, readouts, _ = traced
    rows = some_rows(local, np.random.default_rng(2))
    free, attention, held = (local.run(rows, freeze, readouts=readouts).readout_RxK for freeze in FREEZE_MODES[:3])
    assert np.abs(free - attention).max() > 1e-4 and np.abs(held - attention).max() > 1e-4
    at_last = [[change for change in row if change.position == len(IDS) - 1 and change.layer == 3] for row in rows]
    # A change in the last layer at the last position meets no further attention.
    free, attention = (local.run(at_last, freeze, readouts=readouts).readout_RxK for freeze in FREEZE_MODES[:2])
    np.testing.assert_allclose(free, attention, atol=1e-6)


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
@pytest.mark.parametrize(
    ("row", "freeze", "message"),
    [
        ([Change(9, 1, 0, 1.0)], "none", "feature 0 of layer 9"),
        ([Change(0, 1, 99, 1.0)], "none", "feature 99 of layer 0"),
        ([Change(0, 1, 0, float("nan"))], "none", "a finite number"),
        ([Change(0, 1, 0, 1e39)], "none", "a finite number"),  # in fp32 it is infinite
        ([Change(0, 1, 4.7, 1.0)], "none", "feature 4.7 of layer 0 cannot be set"),
        ([Change(0, 2.5, 4, 1.0)], "none", "position 2.5: this prompt has the positions 0 to 5"),
        (Change(0, 1, 0, 1.0), "none", "edits are rows of changes"),
        ([Change(0, 6, 0, 1.0)], "none", "position 6: this prompt has the positions 0 to 5"),
        ([Change(0, slice(2, 4), 0, 1.0), Change(0, 3, 0, 2.0)], "none", "twice"),
        (
            [Change(0, slice(6, 9), 0, 1.0)],
            "none",
            r"slice\(6, 9, None\) has no position: this prompt has",
        ),
        ([Change(0, slice(6, None), 0, 1.0)], "none", "has no position"),
        ([Change(0, slice(0, 3, 0), 0, 1.0)], "none", "is no slice of positions: slice step cannot be zero"),
        ([Change(0, 1, 0, None)], "none", "a finite number"),
        ([Change(0, 1, 0, "most")], "none", "a finite number"),
        ([Change(0, 1, 0, 1.0), Change(0, 1, 0, 2.0)], "none", "twice"),
        ([], "most", "expected one of none, attention, all, constrained"),
    ],
)
def test_bad_input(traced, row, freeze, message):
    local, _, readouts, _ = traced
    with pytest.raises(UserError, match=message):
        local.run([row], freeze, readouts=readouts)
    for run in (saejax.intervene, lambda local, rows: local.generate(rows[0], 1)):
        with pytest.raises(UserError, match="not finite after these changes"):
            run(local, [[Change(0, 5, feature, 3e38) for feature in range(48)]])
    with pytest.raises(UserError, match="freeze_until is 5: expected a layer, 0 to 3, or 4"):
        local.run([], "all", readouts=readouts, freeze_until=5)
    assert scale(local.active.nodes[:0], 0.0) == [] and local.run([], readouts=readouts).readout_RxK.size == 0


def test_constrained_is_all_held_below_a_layer_but_for_norms(traced, edited):
    """As circuit-tracer has it: of all layers it is "all"; of some, MLPs are held there, attention everywhere."""
    local, transcoders, readouts, _ = traced
    rows = [[Change(0, 2, 3, 2.0)], [Change(1, 3, 5, 1.0), Change(0, 4, 1, 0.5)]]
    held, constrained = (local.run(rows, freeze, readouts=readouts) for freeze in ("all", "constrained"))
    np.testing.assert_allclose(held.readout_RxK, constrained.readout_RxK, atol=5e-6)
    with pytest.raises(UserError, match="a feature of layer 1 is changed, and layers below 1 are constrained"):
        local.run(rows[1:], "constrained", readouts=readouts, freeze_until=1)
    some = local.run(rows[:1], "constrained", readouts=readouts, freeze_until=2)
    if transcoders[0].config.skip:
        return
    softmax, clean, patterns = torch.nn.functional.softmax, [], []
    written_D = torch.from_numpy(np.array(transcoders[0].W_dec_FxD[...])[3]).double()
    before = dict(zip(places(local.active, slice(None)), local.active.value_A.tolist())).get((0, 2, 3), 0.0)

    def record(x, dim, dtype=None):
        patterns.append(softmax(x, dim))
        return patterns[-1]

    def keep(module, inputs, output):
        clean.append(output.detach())

    def hold(layer):
        added_TxD = torch.zeros_like(clean[layer])
        added_TxD[0, 2] = (2.0 - before) * written_D * (layer == 0)
        return lambda module, inputs, output: clean[layer] + added_TxD

    def run(hooks, softmax):
        with contextlib.ExitStack() as stack, torch.no_grad():
            stack.enter_context(mock.patch("torch.nn.functional.softmax", softmax))
            for block, hook in zip(edited.model.model.layers, hooks):
                stack.callback(block.mlp.register_forward_hook(hook).remove)
            return edited.model(torch.tensor([IDS])).logits[0, -1].numpy()

    edited.model.set_attn_implementation("eager")
    run([keep] * 4, record)
    assert len(patterns) == 4
    again = iter(patterns)
    logits_V = run([hold(0), hold(1)], lambda x, dim, dtype=None: next(again))
    np.testing.assert_allclose(some.readout_RxK[0], readouts_of(logits_V), atol=2e-5)


def keys_of(features: Nodes) -> set[tuple[int, int, int]]:
    """Layer, position and number of some features."""
    return set(zip(features.layer_N.tolist(), features.position_N.tolist(), features.index_N.tolist()))


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_other_sets_have_as_many_features_of_the_same_layers_and_positions(traced):
    here, group = traced[0], some_features(traced)
    controls = matched(here, group, 3)
    members, every = keys_of(group), keys_of(here.active.nodes)
    for control in controls:
        keys = keys_of(control)
        assert len(keys) == len(group) and not keys & members
        assert np.array_equal(np.sort(control.layer_N), np.sort(group.layer_N))
        counts, taken, free = (Counter(key[:2] for key in part) for part in (keys, members, every))
        assert all(counts[at] >= min(taken[at], free[at] - taken[at]) for at in taken)
    assert all(np.array_equal(a.index_N, b.index_N) for a, b in zip(controls, matched(here, group, 3)))
    # With more than there are at one position, those come first, and all are different.
    active = here.active
    at_N = np.stack([active.layer_A, active.position_A], axis=1)
    place = next(n for n, at in enumerate(at_N) if 2 < (at_N == at).all(axis=1).sum() < 9)
    sets = [keys_of(one) for one in matched(here, active.nodes[[place]], 99)]
    keys = places(active, slice(None))
    removed = keys.pop(place)
    near = [{key} for key in keys if key[:2] == removed[:2]]
    assert all(one in sets[: len(near)] for one in near) and len(sets) == sum(key[0] == removed[0] for key in keys)
    assert len(set(map(frozenset, sets))) == len(sets)
    with pytest.raises(UserError, match="other active features: expected"):
        matched(here, active.nodes, 1)


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_a_prompt_is_continued_with_changes_as_with_hooks_in_torch(traced, edited):
    changes = [Change(1, slice(3, None), 3, 2.0), Change(2, 2, 5, 1.5), Change(2, slice(0, 2), 5, 1.0)]
    continued = traced[0].generate(changes, 4)
    assert continued.ids_N.tolist() == continued.logits_NxV.argmax(axis=1).tolist() and len(continued.ids_N) == 4
    ids = list(IDS)
    for logits_V in continued.logits_NxV:
        np.testing.assert_allclose(logits_V, edited.run(ids, changes)[0], atol=3e-5)
        ids.append(int(logits_V.argmax()))


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_a_change_may_begin_at_a_new_token_and_one_that_never_does_is_refused(traced, edited):
    local, ids = traced[0], list(IDS)
    changes, ends = [Change(1, slice(7, None), 3, 2.0)], [Change(1, slice(-2, None), 3, 2.0)]
    from_the_start = [Change(1, slice(4, None), 3, 2.0)]
    assert local.generate(ends, 3).ids_N.tolist() == local.generate(from_the_start, 3).ids_N.tolist()
    for logits_V in local.generate(changes, 3).logits_NxV:
        made = changes if len(ids) > 7 else []
        np.testing.assert_allclose(logits_V, edited.run(ids, made)[0], atol=3e-5)
        ids.append(int(logits_V.argmax()))
    with pytest.raises(UserError, match=r"slice\(9, None, 1\) has no position: this prompt has the positions 0 to 8"):
        local.generate([Change(1, slice(9, None), 3, 2.0)], 3)
    with pytest.raises(UserError, match=r"slice\(6, 8, None\) has no position: this prompt has the positions 0 to 5"):
        local.generate([Change(1, slice(6, 8), 3, 2.0)], 3)
    with pytest.raises(UserError, match="is no slice of positions"):
        local.generate([Change(1, slice(2, None, 0), 3, 2.0)], 3)


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_rows_are_continued_side_by_side_with_one_sequence_of_random_numbers(traced):
    local, changes = traced[0], [Change(1, slice(3, None), 3, 2.0)]
    rows = local.generate_rows([[], changes, []], 3, temperature=2.0, seed=7)
    assert [len(row.ids_N) for row in rows] == [3, 3, 3]
    for changed, row in zip(([], changes), rows, strict=False):
        alone = local.generate(changed, 3, temperature=2.0, seed=7)
        assert alone.ids_N.tolist() == row.ids_N.tolist()
        np.testing.assert_allclose(alone.logits_NxV, row.logits_NxV, atol=1e-5)
    assert rows[0].ids_N.tolist() == rows[2].ids_N.tolist()
    # Gumbel noise added to the logits samples their softmax.
    noise_NxV = np.random.default_rng(7).gumbel(size=(3, rows[0].logits_NxV.shape[1]))
    assert rows[0].ids_N.tolist() == (rows[0].logits_NxV / 2.0 + noise_NxV).argmax(axis=1).tolist()
    with pytest.raises(UserError, match="temperature is -1"):
        local.generate([], 1, temperature=-1)


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_a_continuation_ends_where_the_model_ends_the_text(traced, monkeypatch):
    local = traced[0]
    whole = local.generate([], 4)
    assert whole.finished == "length" and len(whole.ids_N) == 4
    for count in (0, 2):
        end = int(whole.ids_N[count])
        if end in whole.ids_N[:count]:
            continue
        monkeypatch.setattr(model, "eos_ids", lambda folder, tokenizer, end=end: (7, end))
        ended = local.generate([], 4)
        assert ended.finished == "eos" and ended.ids_N.tolist() == whole.ids_N[:count].tolist()
        assert np.array_equal(ended.logits_NxV, whole.logits_NxV[:count])


@pytest.mark.parametrize("traced", ["topk"], indirect=True)
def test_attention_may_be_held_while_a_prompt_is_continued(traced, lm):
    local, _, readouts, _ = traced
    row = [Change(0, 2, 3, 4.0), Change(1, 3, 5, 3.0)]
    free, held = (local.generate(row, 2, freeze) for freeze in ("none", "attention"))
    for continued, freeze in ((free, "none"), (held, "attention")):
        wanted_V = local.run([row], freeze, readouts=readouts).logits_RxV[0]
        np.testing.assert_allclose(continued.logits_NxV[0], wanted_V, atol=1e-5)
    assert np.abs(free.logits_NxV[0] - held.logits_NxV[0]).max() > 1e-4
    (plain,) = lm.generate(Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32)), 3)
    assert local.generate([], 3, "attention").ids_N.tolist()[: len(plain.ids)] == list(plain.ids)
    with pytest.raises(UserError, match="freeze is 'all'"):
        local.generate(row, 2, "all")


# Statement 11 of WORKSPACE.md, what must hold.
def test_sources_add_up_to_the_model_with_sinks_too(lm):
    """At a sink no feature is used, and all that the MLP adds but the decoder's bias is the error."""
    tokens = Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32))
    made, transcoders = [], made_set(lm)
    read = lm(tokens, capture=[transcoder.site for transcoder in transcoders]).sites
    for transcoder in transcoders:
        norm_T = np.linalg.norm(np.asarray(read[transcoder.site])[0], axis=-1)
        config = dataclasses.replace(transcoder.config, max_norm=float(np.sort(norm_T[1:])[-2:].mean()))
        made.append(Dictionary(config, **transcoder.arrays))
    graph, local, _ = trace_prompt(lm, LayerTranscoders.of(made), IDS, targets=[7])
    sinks_LxP = np.ones((4, len(IDS)), bool)
    sinks_LxP[local.active.layer_A, local.active.position_A] = False
    assert (sinks_LxP[:, 1:].sum(axis=1) == 1).all()
    assert np.abs(graph.unexplained_R).max() < 1e-5 * np.abs(graph.value_R).max()


def test_a_position_that_a_change_makes_as_long_as_a_sink_keeps_its_features(lm):
    """Sinks are the prompt's: where it has none, changes do what they do without any rule for sinks."""
    made, tokens = made_set(lm), Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32))
    sites = [f"resid_mid.{layer}" for layer in range(4)]
    read = lm(tokens, capture=sites).sites
    rows = [[Change(0, 3, 6, 50.0), *(Change(2, 3, other, 0.0) for other in range(48))], [Change(0, 3, 6, 50.0)]]
    found = []
    for factor in (1e6, 1.01):
        norms = [factor * float(np.linalg.norm(np.asarray(read[site])[0], axis=-1).max()) for site in sites]
        configs = [
            dataclasses.replace(one.config, site=site, max_norm=norm)
            for one, site, norm in zip(made, sites, norms, strict=True)
        ]
        local = LocalModel(lm, [one.with_config(config) for one, config in zip(made, configs, strict=True)], IDS)
        assert not local.sink_LxP.any()
        found.append(local.run(rows).logits_RxV)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    assert np.abs(found[0][0] - found[0][1]).max() > 1e-3  # the second change does something


@pytest.mark.parametrize("traced", ["skip"], indirect=True)
def test_with_another_prompts_tokens_under_the_frozen_constants_edges_are_the_same(traced, monkeypatch):
    local, _, readouts, graph = traced
    active = local.active
    other_T = np.pad([88, 3, 61, 12, 240, 7], (0, local.stream_LxTxD.shape[1] - len(IDS)))
    other_TxD = embed(local.frozen, other_T)
    real, starts = model.run_layer, []

    def run_layer(frozen, freeze, layer, x_BxTxD, *rest):
        if not starts:  # the rows enter layer 0 with the other prompt's tokens
            starts.append(layer)
            x_BxTxD = jnp.concatenate([x_BxTxD[:1], jnp.tile(other_TxD[None], (len(x_BxTxD) - 1, 1, 1))])
        return real(frozen, freeze, layer, x_BxTxD, *rest)

    monkeypatch.setattr(model, "run_layer", run_layer)
    chosen = np.linspace(0, len(active) - 1, 8).astype(int)
    values_A = 65 * active.value_A[chosen]
    raised = [[Change(*place, float(value))] for place, value in zip(places(active, chosen), values_A, strict=True)]
    changed = local.run([[], *raised], "all", readouts=readouts, features=range(len(active)))
    assert starts == [0]
    seen_RxT = np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1)
    assert np.abs(seen_RxT[0, -3:] - readouts.value_K).max() > 0.05  # the tokens do make a difference
    edge_RxT = graph.adjacency_RxS[:, chosen].T
    assert np.abs(edge_RxT).max() > 0.01
    moved_RxT = (seen_RxT[1:] - seen_RxT[:1]) / 64
    assert np.abs(moved_RxT - edge_RxT).max() < 3e-6 * np.abs(edge_RxT).max()

"""Rows of changes made of a graph's features: against sums of edges, and against hooks in PyTorch."""

import dataclasses

import numpy as np
import pytest
from made_transcoders import made_set

from saejax import load_model, trace
from saejax.attribution import changes, interventions
from saejax.attribution.changes import ablate, features_of, matched, moved, scale, set_to, steer, swap
from saejax.attribution.graph import TOKEN
from saejax.attribution.interventions import intervene
from saejax.attribution.replacement import Replacement
from saejax.attribution.targets import Direction, read_targets
from saejax.attribution.transcoders import TranscoderSet
from saejax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compiler")
IDS = [5, 17, 33, 8, 41, 100]
OTHER = [5, 90, 17, 61, 8, 2, 77, 100]  # two tokens more
TARGETS = [7, (9, 11)]


@dataclasses.dataclass
class Setting:
    """A prompt, its graph and another prompt, and the model in PyTorch with its transcoders' arrays."""

    here: Replacement
    there: Replacement
    transcoders: list
    readouts: object
    graph: object
    torch_model: object

    def group(self, seed=1, count=9):
        """Some features of all layers."""
        rng = np.random.default_rng(seed)
        return features_of(self.graph, np.sort(rng.permutation(len(self.here.active))[:count]))

    def plain(self, edit, entering=None, ids=IDS):
        """The readouts in fp64, where ``edit(layer, activations [T, F])`` gives what is added to each activation.

        ``entering``: a layer, and the stream [T, D] that enters it instead.
        """
        import torch

        handles = []
        for layer, block in enumerate(self.torch_model.model.layers):

            def write(module, inputs, output, layer=layer):
                acts_TxF = np.asarray(self.transcoders[layer].encode(inputs[0][0].numpy().astype(np.float32)))
                added_TxD = edit(layer, acts_TxF.astype(np.float64)) @ np.asarray(self.transcoders[layer].W_dec_FxD)
                return output + torch.from_numpy(added_TxD)[None]

            def enter(module, inputs, layer=layer):
                if entering and entering[0] == layer:
                    return (torch.from_numpy(entering[1])[None], *inputs[1:])

            handles += [block.mlp.register_forward_hook(write), block.register_forward_pre_hook(enter)]
        with torch.no_grad():
            logits_V = self.torch_model(torch.tensor([ids])).logits[0, -1].numpy()
        for handle in handles:
            handle.remove()
        return np.array([logits_V[7] - logits_V.mean(), logits_V[9] - logits_V[11]])

    def making(self, row, first=0):
        """An ``edit`` that makes a row's changes in the layers from ``first`` on."""

        def edit(layer, acts_TxF):
            added_TxF = np.zeros_like(acts_TxF)
            for _, position, feature, value in (c for c in row if c.layer == layer >= first):
                added_TxF[position, feature] = value - acts_TxF[position, feature]
            return added_TxF

        return edit


@pytest.fixture(scope="module", params=["standard", "topk"])
def setting(request, tiny_llama, one_device):
    from saejax.models import source

    lm = load_model(str(tiny_llama), mesh=one_device)
    transcoders = made_set(lm, kind=request.param)
    opened = TranscoderSet.of(transcoders)
    here, there = (Replacement.of(lm, opened, np.array(ids)) for ids in (IDS, OTHER))
    graph = trace(lm, opened, IDS, targets=TARGETS)
    torch_model = source.load_torch_model(lm.source, "float32").double()
    return Setting(here, there, transcoders, read_targets(here, TARGETS, 10, 0.95), graph, torch_model)


def test_with_all_held_ablation_takes_the_sum_of_the_edges_away(setting):
    graph, here = setting.graph, setting.here
    groups = [np.arange(0, 40, 3), np.arange(len(here.active)), np.array([7])]
    rows = [ablate(features_of(graph, group)) for group in groups]
    every_A = np.arange(len(here.active))
    changed = intervene(here, rows, setting.readouts, every_A, hold="all")
    after_RxT = np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1).astype(np.float64)
    moved_RxT = after_RxT - np.concatenate([here.active.value_A, setting.readouts.value_K])
    edges_RxT = np.stack([graph.adjacency_TxS[:, group].sum(axis=1, dtype=np.float64) for group in groups])
    assert np.abs(moved_RxT + edges_RxT).max() < 1e-5 * np.abs(edges_RxT).max()
    np.testing.assert_allclose(moved_RxT[1, -2:], -edges_RxT[1, -2:], rtol=1e-5)  # logits, all features


@pytest.mark.parametrize("make", [ablate, lambda f: scale(f, -1.5), lambda f: set_to(f, np.linspace(0, 2, len(f)))])
def test_with_nothing_held_the_model_runs_as_with_hooks_in_torch(setting, make):
    row = make(setting.group())
    ours_K = intervene(setting.here, [row], setting.readouts).readout_RxK[0]
    wanted_K = setting.plain(setting.making(row))
    assert np.abs(wanted_K - setting.readouts.value_K).max() > 0.01
    np.testing.assert_allclose(ours_K, wanted_K, atol=2e-5)


def test_above_the_last_held_layer_the_model_runs_freely(setting):
    here, row, until = setting.here, ablate(setting.group(2, 24)), 2
    assert {change.layer for change in row} == {0, 1, 2, 3}
    ways = {u: intervene(here, [row], setting.readouts, hold="all", hold_until=u).readout_RxK[0] for u in range(5)}
    ways |= {hold: intervene(here, [row], setting.readouts, hold=hold).readout_RxK[0] for hold in ("nothing", "all")}
    np.testing.assert_array_equal(ways[0], ways["nothing"])
    assert all(np.abs(ways[u] - ways[v]).max() > 1e-4 for u, v in ((0, 1), (1, 2), (2, 3), (4, "all")))
    # The stream that enters layer 2 is the prompt's and what all changes below add to it, number by number.
    width = here.model.config.d_model
    axes = [
        Direction(axis_D, layer=until, position=t)
        for t in range(len(IDS))
        for axis_D in np.eye(width, dtype=np.float32)
    ]
    below = [change for change in row if change.layer < until]
    entering_TxD = intervene(here, [below], read_targets(here, axes, 10, 0.95), hold="all").readout_RxK
    entering = until, entering_TxD.reshape(len(IDS), width).astype(np.float64)
    np.testing.assert_allclose(ways[until], setting.plain(setting.making(row, until), entering), atol=2e-5)


def test_a_swap_gives_features_the_other_prompts_activations(setting):
    here, there = setting.here, setting.there
    row = swap(here, there)
    positions = {change.position for change in row}
    assert positions == {1, 2, 3, 4, 5}
    own = {(layer, t, f) for layer, t, f in zip(here.active.layer_A, here.active.position_A, here.active.feature_A)}
    fresh = [change for change in row if change[:3] not in own]
    assert fresh and all(change.value for change in fresh) and any(change.value == 0 for change in row)
    dense = {layer: np.zeros((len(IDS), 48)) for layer in range(4)}  # of the other prompt, the last six positions
    for layer, t, feature, value in zip(
        there.active.layer_A, there.active.position_A, there.active.feature_A, there.active.value_A
    ):
        if t >= 2:
            dense[layer][t - 2, feature] = value
    ours_K = intervene(here, [row], setting.readouts).readout_RxK[0]
    made = {change[:3] for change in row}

    def edit(layer, acts_TxF):
        mask_TxF = np.zeros(acts_TxF.shape, bool)
        for _, t, feature in (key for key in made if key[0] == layer):
            mask_TxF[t, feature] = True
        either_TxF = dense[layer] != 0
        either_TxF[0] = False
        assert (mask_TxF >= either_TxF).all()  # all that is active there is set
        return np.where(mask_TxF, dense[layer] - acts_TxF, 0)

    wanted_K = setting.plain(edit)
    assert np.abs(wanted_K - setting.readouts.value_K).max() > 0.01
    np.testing.assert_allclose(ours_K, wanted_K, atol=2e-5)


def test_a_swap_with_the_same_prompt_changes_nothing(setting):
    row = swap(setting.here, setting.here)
    assert len(row) == len(setting.here.active)
    for hold in ("nothing", "all"):
        found_K = intervene(setting.here, [row], setting.readouts, hold=hold).readout_RxK[0]
        np.testing.assert_allclose(found_K, setting.readouts.value_K, atol=1e-5)


def test_a_swap_the_other_way_round_leaves_positions_without_a_counterpart(setting):
    # The longer prompt runs: its positions 1 and 2 would be the shorter one's -1 and 0.
    assert {change.position for change in swap(setting.there, setting.here)} == {3, 4, 5, 6, 7}
    first = setting.group()[:1]
    at_two = dataclasses.replace(first, position_N=np.array([2], np.int32))
    with pytest.raises(UserError, match="position 2 has no counterpart in the other prompt, of 6 tokens: expected 3"):
        swap(setting.there, setting.here, at_two)
    theirs = moved(first, setting.there, setting.here)
    assert theirs.position_N[0] == first.position_N[0] + 2
    (change,) = swap(setting.there, setting.here, theirs)
    assert change.value == pytest.approx(first.value_N[0])


def test_curves_of_sets_and_of_others_like_them(setting):
    group = setting.group()
    controls = matched(setting.here, group, 3)
    found = steer(setting.here, [group, *controls], setting.readouts)
    assert found.readout_SxMxK.shape == (4, len(changes.FACTORS), 2)
    unchanged = found.readout_SxMxK[:, list(found.factor_M).index(1.0)]
    np.testing.assert_allclose(unchanged, np.tile(setting.readouts.value_K, (4, 1)), atol=1e-5)
    taken = intervene(setting.here, [ablate(group)], setting.readouts).readout_RxK[0]
    np.testing.assert_allclose(found.readout_SxMxK[0, list(found.factor_M).index(0.0)], taken, atol=1e-6)
    held = steer(setting.here, [group], setting.readouts, (0, 1, 3), hold="all").readout_SxMxK[0]
    np.testing.assert_allclose(held[2] - held[1], 2 * (held[1] - held[0]), atol=1e-5)
    own = {(layer, t, f) for layer, t, f in zip(group.layer_N, group.position_N, group.index_N)}
    for control in controls:
        keys = {(layer, t, f) for layer, t, f in zip(control.layer_N, control.position_N, control.index_N)}
        assert len(keys) == len(group) and not keys & own
        assert np.array_equal(np.sort(control.layer_N), np.sort(group.layer_N))
    same = sum(np.array_equal(np.sort(control.position_N), np.sort(group.position_N)) for control in controls)
    assert same  # where enough features are active at the position
    again = matched(setting.here, group, 3)
    assert all(np.array_equal(a.index_N, b.index_N) for a, b in zip(controls, again))
    assert any(not np.array_equal(a.index_N, b.index_N) for a, b in zip(controls, matched(setting.here, group, 3, 1)))


def test_thousands_of_rows_in_one_call_are_those_of_single_calls(setting, monkeypatch):
    singles = [ablate(features_of(setting.graph, [node])) for node in range(len(setting.here.active))]
    rows = (singles * 20)[:2000]
    rows[1234] = ablate(features_of(setting.graph, np.arange(len(setting.here.active))))
    together = intervene(setting.here, rows, setting.readouts).readout_RxK
    monkeypatch.setattr(interventions, "_CHUNK", 2**18)
    np.testing.assert_allclose(intervene(setting.here, rows, setting.readouts).readout_RxK, together, atol=2e-6)
    for number in (0, 3, 1234, 1999):
        alone_K = intervene(setting.here, [rows[number]], setting.readouts).readout_RxK[0]
        np.testing.assert_allclose(together[number], alone_K, atol=2e-6)


def test_bad_input(setting, tiny_llama, one_device):
    graph, here = setting.graph, setting.here
    with pytest.raises(UserError, match="is of the kind token: features alone can be changed"):
        features_of(graph, [0, graph.slice_of(TOKEN).start])
    with pytest.raises(UserError, match="cannot be set to nan"):
        intervene(here, [scale(setting.group(), float("nan"))], setting.readouts)
    with pytest.raises(UserError, match="hold_until is 5: expected a layer, 0 to 3, or 4"):
        intervene(here, [], setting.readouts, hold="all", hold_until=5)
    with pytest.raises(UserError, match="other active features: expected"):
        matched(here, features_of(graph, np.arange(len(here.active))), 1)
    with pytest.raises(UserError, match="different models or transcoders"):
        swap(here, dataclasses.replace(setting.there, model=load_model(str(tiny_llama), mesh=one_device)))
    assert ablate(setting.group(count=0)) == [] and steer(here, [], setting.readouts).readout_SxMxK.size == 0

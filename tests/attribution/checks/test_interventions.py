"""Features set to other values: against hooks in PyTorch, and against what holds by construction."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from made_transcoders import made_set

from saejax import load_model, trace
from saejax.attribution.checks import interventions
from saejax.attribution.checks.circuit_runs import Circuit, mean_activations, run_circuits
from saejax.attribution.checks.circuits import curve
from saejax.attribution.checks.interventions import HOLDS, Change, intervene
from saejax.attribution.checks.validation import double
from saejax.attribution.local.replacement import Replacement, embed
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.targets import Direction, read_targets
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.tokens import Tokens

pytestmark = pytest.mark.usefixtures("quick_compiler")
IDS = [5, 17, 33, 8, 41, 100]


@pytest.fixture(scope="module")
def lm(tiny_llama, one_device):
    return load_model(str(tiny_llama), mesh=one_device)


@pytest.fixture(scope="module", params=["standard", "topk", "skip"])
def traced(lm, request):
    """A replacement model, its transcoders, its readouts (two logits, a difference, a direction), and the graph."""
    skip = request.param == "skip"
    transcoders = made_set(lm, kind="jumprelu" if skip else request.param, skip=skip)
    targets = [7, 9, (7, 11), Direction(np.eye(lm.config.d_model)[3], layer=2, position=4)]
    replacement = Replacement.of(lm, LayerTranscoders.of(transcoders), np.array(IDS))
    return (
        replacement,
        transcoders,
        read_targets(replacement, targets, 10, 0.95),
        trace(lm, transcoders, IDS, targets=targets),
    )


def some_rows(replacement, rng):
    """Rows of one change and of three, of active features and of others."""
    active, rows = replacement.active, []
    for count in (1, 1, 3, 3):
        chosen = rng.permutation(len(active))[:count]
        rows.append(
            [
                Change(int(active.layer_A[c]), int(active.position_A[c]), int(active.feature_A[c]), float(v))
                for c, v in zip(chosen, rng.normal(1.0, 1.0, count), strict=True)
            ]
        )
    return [*rows, [Change(1, 3, 0, 2.5), Change(0, 3, 1, 1.5), Change(2, 5, 2, 0.0)]]


def test_the_model_runs_on_as_with_hooks_in_torch(traced, lm):
    import torch

    from saejax.models import source

    replacement, transcoders, readouts, _ = traced
    model = source.load_torch_model(lm.source, "float32").double()
    rows = some_rows(replacement, np.random.default_rng(1))
    ours_RxK = intervene(replacement, rows, readouts).readout_RxK
    for row, ours_K in zip(rows, ours_RxK, strict=True):
        handles, streams = [], {}
        for layer, block in enumerate(model.model.layers):

            def change(module, inputs, output, layer=layer, row=row):
                transcoder, output = transcoders[layer], output.clone()
                acts_TxF = np.asarray(transcoder.encode(np.asarray(inputs[0][0].numpy(), np.float32)))
                for _, position, feature, value in (c for c in row if c.layer == layer):
                    direction_D = torch.from_numpy(np.array(transcoder.W_dec_FxD[...])[feature]).double()
                    output[0, position] += (value - float(acts_TxF[position, feature])) * direction_D
                return output

            def keep(module, inputs, layer=layer, streams=streams):
                streams[layer] = inputs[0][0].numpy()

            handles += [block.mlp.register_forward_hook(change), block.register_forward_pre_hook(keep)]
        with torch.no_grad():
            logits_V = model(torch.tensor([IDS])).logits[0, -1].numpy()
        for handle in handles:
            handle.remove()
        mean = logits_V.mean()
        wanted_K = [logits_V[7] - mean, logits_V[9] - mean, logits_V[7] - logits_V[11], streams[2][4, 3]]
        np.testing.assert_allclose(ours_K, wanted_K, atol=2e-5)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_feature_set_to_its_own_value_changes_nothing(traced, hold):
    replacement, _, readouts, _ = traced
    active = replacement.active
    own = [
        Change(int(active.layer_A[a]), int(active.position_A[a]), int(active.feature_A[a]), float(active.value_A[a]))
        for a in (0, len(active) // 2, len(active) - 1)
    ]
    changed = intervene(replacement, [own, []], readouts, range(len(active)), hold)
    np.testing.assert_allclose(changed.readout_RxK, np.tile(readouts.value_K, (2, 1)), atol=5e-6)
    np.testing.assert_allclose(changed.feature_RxJ, np.tile(active.value_A, (2, 1)), atol=5e-6)
    assert (intervene(replacement, [[]], readouts, [0], hold).readout_RxK == readouts.value_K).all()


def test_with_another_prompts_tokens_under_the_frozen_constants_edges_are_the_same(traced, monkeypatch):
    replacement, _, readouts, graph = traced
    active, streams = replacement.active, replacement.streams
    other_T = np.pad([88, 3, 61, 12, 240, 7], (0, streams.stream_LxTxD.shape[1] - len(IDS)))
    other_TxD = embed(replacement.frozen, replacement.model.params, other_T)

    def swapped(replacement, rows, first):
        assert first == 0
        return jnp.tile(other_TxD[None], (rows, 1, 1))

    monkeypatch.setattr(interventions, "_unchanged", swapped)
    chosen = np.linspace(0, len(active) - 1, 8).astype(int)
    columns = zip(
        *(getattr(active, name)[chosen].tolist() for name in ("layer_A", "position_A", "feature_A")), strict=True
    )
    raised = [[Change(*place, 65 * float(active.value_A[a]))] for a, place in zip(chosen, columns, strict=True)]
    changed = intervene(replacement, [[], *raised], readouts, range(len(active)), hold="all")
    seen_RxT = np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1)
    assert np.abs(seen_RxT[0, -4:] - readouts.value_K).max() > 0.05  # the tokens do make a difference
    edge_RxT = graph.adjacency_RxS[:, chosen].T
    assert np.abs(edge_RxT).max() > 0.01
    moved_RxT = (seen_RxT[1:] - seen_RxT[:1]) / 64
    assert np.abs(moved_RxT - edge_RxT).max() < 3e-6 * np.abs(edge_RxT).max()


def test_with_all_held_a_change_is_its_edge(traced):
    replacement, _, readouts, graph = traced
    doubling = double(replacement, graph, readouts, 12)
    assert doubling.held_error < 3e-6
    assert np.abs(doubling.edge_ExR).max() > 0.01
    assert np.abs(doubling.free_ExR - doubling.edge_ExR).max() > 1e-3  # norms, attention and MLPs do react
    found = doubling.results.free
    assert 0 < found.pearson <= 1 and found.sign > 0.5


def test_attention_can_be_held_alone(traced):
    replacement, _, readouts, _ = traced
    rows = some_rows(replacement, np.random.default_rng(2))
    free, attention, held = (intervene(replacement, rows, readouts, hold=hold).readout_RxK for hold in HOLDS[:3])
    assert np.abs(free - attention).max() > 1e-4 and np.abs(held - attention).max() > 1e-4
    at_last = [[change for change in row if change.position == len(IDS) - 1 and change.layer == 3] for row in rows]
    # A change in the last layer at the last position meets no further attention.
    free, attention = (intervene(replacement, at_last, readouts, hold=hold).readout_RxK for hold in HOLDS[:2])
    np.testing.assert_allclose(free, attention, atol=1e-6)


def test_everything_kept_is_the_model_and_parts_are_between(traced):
    replacement, _, readouts, graph = traced
    if (readouts.layer_K != replacement.model.config.n_layers).any():
        readouts = read_targets(replacement, [7], 10, 0.95)
        graph = trace(replacement.model, replacement.transcoders, IDS, targets=[7])
    found = curve(replacement, graph, readouts, (0.3, 0.8, 1.0))
    np.testing.assert_allclose(found.model, readouts.value_K[0], atol=1e-5)
    assert found.features_C[0] < found.features_C[1] < found.features_C[2]
    assert abs(found.model - found.empty) > 0.01
    every = Circuit(np.ones(len(replacement.active), bool), np.ones((4, len(IDS)), bool))
    np.testing.assert_allclose(
        run_circuits(replacement, [every, every.complement()], readouts)[:, 0], [found.model, found.empty], atol=1e-5
    )


def test_everything_kept_is_the_model_with_sinks_too(lm):
    """At a sink no feature is used, and all that the MLP adds but the decoder's bias is the error."""
    tokens = Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32))
    made = []
    for transcoder in made_set(lm):
        norm_T = np.linalg.norm(np.asarray(lm(tokens, capture=[transcoder.site]).sites[transcoder.site])[0], axis=-1)
        config = dataclasses.replace(transcoder.config, max_norm=float(np.sort(norm_T[1:])[-2:].mean()))
        made.append(Dictionary(config, **transcoder.arrays))
    replacement = Replacement.of(lm, LayerTranscoders.of(made), np.array(IDS))
    sinks_LxP = np.ones((4, len(IDS)), bool)
    sinks_LxP[replacement.active.layer_A, replacement.active.position_A] = False
    assert (sinks_LxP[:, 1:].sum(axis=1) == 1).all()
    readouts = read_targets(replacement, [7], 10, 0.95)
    every = Circuit(np.ones(len(replacement.active), bool), np.ones((4, len(IDS)), bool))
    kept = run_circuits(replacement, [every], readouts)[0, 0]
    np.testing.assert_allclose(kept, readouts.value_K[0], atol=1e-6)


def test_what_is_left_out_may_have_its_mean_activation(traced, lm):
    import torch

    from saejax.models import source

    replacement, transcoders, _, _ = traced
    readouts = read_targets(replacement, [7], 10, 0.95)
    other = Replacement.of(lm, replacement.transcoders, np.array(IDS[:2] + [90, 61]))
    means = mean_activations([replacement, other])
    for layer in range(4):
        total_F = np.zeros(48)
        for active in (replacement.active, other.active):
            own = active.layer_A == layer
            np.add.at(total_F, active.feature_A[own], active.value_A[own])
        np.testing.assert_allclose(means[layer], total_F / (len(IDS) - 1 + 3), rtol=1e-6)
    every = Circuit(np.ones(len(replacement.active), bool), np.ones((4, len(IDS)), bool))
    kept, none = run_circuits(replacement, [every, every.complement()], readouts, means)[:, 0]
    np.testing.assert_allclose(kept, readouts.value_K[0], atol=1e-5)
    assert abs(none - run_circuits(replacement, [every.complement()], readouts)[0, 0]) > 1e-3
    graph = trace(lm, replacement.transcoders, IDS, targets=[7])
    found = curve(replacement, graph, readouts, (1.0,), means)
    np.testing.assert_allclose([found.model, found.empty], [kept, none], atol=1e-5)
    # In torch: of each MLP, the means of the features that are active in the prompt, the bias and the skip path.
    model, active = source.load_torch_model(lm.source, "float32").double(), replacement.active
    for layer, block in enumerate(model.model.layers):

        def write(module, inputs, output, layer=layer):
            acts_TxF, own = np.zeros((len(IDS), 48), np.float32), active.layer_A == layer
            acts_TxF[active.position_A[own], active.feature_A[own]] = means[layer][active.feature_A[own]]
            read_TxD = inputs[0][0].numpy().astype(np.float32)
            written_TxD = torch.from_numpy(np.array(transcoders[layer].decode(acts_TxF, read_TxD))).double()
            return torch.cat([output[:, :1], written_TxD[None, 1:]], dim=1)

        block.mlp.register_forward_hook(write)
    with torch.no_grad():
        logits_V = model(torch.tensor([IDS])).logits[0, -1]
    np.testing.assert_allclose(none, float(logits_V[7] - logits_V.mean()), atol=2e-5)


@pytest.mark.parametrize(
    "rows,message",
    [
        ([[Change(9, 1, 0, 1.0)]], "feature 0 of layer 9"),
        ([[Change(0, 1, 99, 1.0)]], "feature 99 of layer 0"),
        ([[Change(0, 1, 0, float("nan"))]], "a finite number"),
        ([[Change(0, 6, 0, 1.0)]], "position 6: this prompt has the positions 0 to 5"),
        ([[Change(0, slice(2, 4), 0, 1.0), Change(0, 3, 0, 2.0)]], "twice"),
        ([[Change(0, 1, 0, 1.0), Change(0, 1, 0, 2.0)]], "twice"),
    ],
)
def test_bad_input(traced, rows, message):
    with pytest.raises(UserError, match=message):
        intervene(traced[0], rows, traced[2])
    with pytest.raises(UserError, match="expected one of nothing, attention, all, constrained"):
        intervene(traced[0], [], traced[2], hold="most")


def test_slices_the_first_position_and_all_logits_as_with_hooks_in_torch(traced, lm):
    """A feature at every position, also at the first, where it has the activation 0 before."""
    import torch

    from saejax.models import source

    replacement, transcoders, readouts, _ = traced
    row = [Change(1, slice(None), 3, 2.0)]
    changed = intervene(replacement, [row, []], readouts, logits=True)
    model = source.load_torch_model(lm.source, "float32").double()

    def change(module, inputs, output):
        acts_T = np.asarray(transcoders[1].encode(np.asarray(inputs[0][0].numpy(), np.float32)))[:, 3].copy()
        acts_T[0] = 0
        direction_D = np.array(transcoders[1].W_dec_FxD[...])[3]
        return output + torch.from_numpy((2.0 - acts_T)[:, None] * direction_D).double()[None]

    handle = model.model.layers[1].mlp.register_forward_hook(change)
    with torch.no_grad():
        np.testing.assert_allclose(changed.logits_RxV[0], model(torch.tensor([IDS])).logits[0, -1], atol=2e-5)
        handle.remove()
        np.testing.assert_allclose(changed.logits_RxV[1], model(torch.tensor([IDS])).logits[0, -1], atol=2e-5)
    np.testing.assert_allclose(intervene(replacement, [[]], readouts, logits=True).logits_RxV[0], replacement.logits_V)


def test_constrained_is_all_held_below_a_layer_but_for_norms(traced, lm):
    """As circuit-tracer has it: of all layers it is "all"; of some, MLPs are held there, attention everywhere."""
    import torch

    from saejax.models import source

    replacement, transcoders, readouts, _ = traced
    rows = [[Change(0, 2, 3, 2.0)], [Change(1, 3, 5, 1.0), Change(0, 4, 1, 0.5)]]
    held, constrained = (intervene(replacement, rows, readouts, hold=hold) for hold in ("all", "constrained"))
    np.testing.assert_array_equal(held.readout_RxK, constrained.readout_RxK)
    some = intervene(replacement, rows[:1], readouts, hold="constrained", hold_until=2)
    if transcoders[0].config.skip:
        return
    model = source.load_torch_model(lm.source, "float32").double()
    model.set_attn_implementation("eager")
    clean, patterns = {}, []
    softmax = torch.nn.functional.softmax
    active = replacement.active
    own_A = (active.layer_A == 0) & (active.position_A == 2) & (active.feature_A == 3)
    before = float(active.value_A[own_A].sum())

    def keep(layer):
        return lambda module, inputs, output: clean.setdefault(layer, output.detach())

    def fixed(layer):
        def hook(module, inputs, output):
            output = clean[layer].clone()
            if layer == 0:
                output[0, 2] += (2.0 - before) * torch.from_numpy(np.array(transcoders[0].W_dec_FxD[...])[3]).double()
            return output

        return hook

    def recorded(x, dim, dtype=None):
        patterns.append(softmax(x, dim))
        return patterns[-1]

    def run(hook, layers, softmax):
        handles = [model.model.layers[layer].mlp.register_forward_hook(hook(layer)) for layer in layers]
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.functional.softmax", softmax)
            logits_V = model(torch.tensor([IDS])).logits[0, -1].numpy()
        for handle in handles:
            handle.remove()
        return logits_V

    run(keep, range(4), recorded)
    assert len(patterns) == 4
    again = iter(patterns)
    logits_V = run(fixed, range(2), lambda x, dim, dtype=None: next(again))
    wanted_K = [logits_V[7] - logits_V.mean(), logits_V[9] - logits_V.mean(), logits_V[7] - logits_V[11]]
    np.testing.assert_allclose(some.readout_RxK[0, :3], wanted_K, atol=2e-5)
    with pytest.raises(UserError, match="a feature of layer 1 is changed, and layers below 1 are constrained"):
        intervene(replacement, rows[1:], readouts, hold="constrained", hold_until=1)

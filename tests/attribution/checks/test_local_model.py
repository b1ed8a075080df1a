"""The local model of a prompt: runs with edits against hooks in PyTorch, its linear directions, parts run alone."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from made_transcoders import IDS, made_set

import saejax
from saejax import trace
from saejax.attribution.checks import double, faithfulness_curve
from saejax.attribution.local import layers
from saejax.attribution.local.edits import Change, Circuit
from saejax.attribution.local.layers import FREEZE_MODES, embed
from saejax.attribution.local.model import LocalModel, LocalRun, Vectors
from saejax.attribution.local.prompt_run import prompt_ids
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.targets import read_targets
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.tokens import Tokens
from saejax.results import to_json


def test_pushing_a_source_up_gives_what_pulling_a_target_down_does(traced):
    """A direction of the stream that enters layer 2 reads the edges of the features below."""
    local, transcoders, readouts, graph = traced
    active = local.active
    below = np.flatnonzero((active.layer_A < 2) & (active.position_A <= 4))
    chosen = below[:: max(len(below) // 8, 1)]
    rows_AxD = [transcoders[layer].W_dec_FxD[...] for layer in active.layer_A[chosen]]
    vector_SxD = np.stack([np.asarray(w_FxD)[f] for w_FxD, f in zip(rows_AxD, active.feature_A[chosen], strict=True)])
    vector_SxD = active.value_A[chosen, None] * vector_SxD
    added = Vectors(np.arange(len(chosen)), active.layer_A[chosen] + 1, active.position_A[chosen], vector_SxD)
    changes = {layer: change for layer, change, _ in local.pushforward(added, len(chosen))}
    found_S = np.einsum("sd,d->s", np.asarray(changes[2])[:, 4], readouts.vector_KxD[3])
    wanted_S = graph.adjacency_RxS[-1, chosen]
    np.testing.assert_allclose(found_S, wanted_S, atol=1e-5 * np.abs(wanted_S).max())
    assert np.abs(wanted_S).max() > 1e-3
    pulled_RxS = local.pullback(readouts.layer_K, readouts.position_K, readouts.vector_KxD, in_stream=True)
    np.testing.assert_allclose(pulled_RxS, graph.adjacency_RxS[-4:], atol=1e-6)


def test_the_library_runs_edits_and_gives_logits(lm):
    local = saejax.LocalModel(lm, made_set(lm), IDS)
    active = local.active
    change = saejax.Change(int(active.layer_A[0]), int(active.position_A[0]), int(active.feature_A[0]), 0.0)
    logits_RxV = saejax.intervene(local, [[], [change]])
    np.testing.assert_allclose(logits_RxV[0], local.logits_V, atol=1e-5)  # 4.4e-6 in a batch
    assert logits_RxV.shape == (2, lm.config.vocab) and np.abs(logits_RxV[1] - local.logits_V).max() > 1e-5
    graph = saejax.trace(lm, local.dictionaries, IDS)
    assert len(graph.prune().nodes) < len(graph.nodes)
    with pytest.raises(UserError, match="freeze is 'all': circuits run freely"):
        circuit = Circuit(np.ones(len(active), bool), np.ones((4, len(IDS)), bool))
        local.run([circuit], "all")


@pytest.mark.parametrize(
    ("text", "ids", "wanted"),
    [
        ("The cat", [2, 5, 6], [2, 5, 6]),
        ("<bos>The cat", [2, 2, 5, 6], [2, 5, 6]),  # the tokenizer puts one before the text's own
        ("The cat", [5, 6], [2, 5, 6]),  # it puts none
        ("<bos>The cat", [2, 5, 6], [2, 5, 6]),
        ("<bos>", [2, 2], [2]),
    ],
)
def test_a_prompt_begins_with_one_bos(text, ids, wanted):
    tokenizer = SimpleNamespace(bos_token_id=2, pad_token_id=0, eos_token_id=1, all_special_ids=[0, 1, 2])
    model = SimpleNamespace(
        tokenizer=tokenizer, tokenize=lambda texts: SimpleNamespace(ids_BxT=np.array([ids], np.int32)),
        config=SimpleNamespace(vocab=10, context=8),
    )  # fmt: skip
    assert prompt_ids(model, text).tolist() == wanted


def some_rows(local, rng):
    """Rows of one change and of three, of active features and of others."""
    active, rows = local.active, []
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

    local, transcoders, readouts, _ = traced
    model = source.load_torch_model(lm.source, "float32").double()
    rows = some_rows(local, np.random.default_rng(1))
    ours_RxK = local.run(rows, readouts=readouts).readout_RxK
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


@pytest.mark.parametrize("freeze", FREEZE_MODES)
def test_a_feature_set_to_its_own_value_changes_nothing(traced, freeze):
    local, _, readouts, _ = traced
    active = local.active
    own = [
        Change(int(active.layer_A[a]), int(active.position_A[a]), int(active.feature_A[a]), float(active.value_A[a]))
        for a in (0, len(active) // 2, len(active) - 1)
    ]
    changed = local.run([own, []], freeze, readouts=readouts, features=range(len(active)))
    np.testing.assert_allclose(changed.readout_RxK, np.tile(readouts.value_K, (2, 1)), atol=5e-6)
    np.testing.assert_allclose(changed.feature_RxJ, np.tile(active.value_A, (2, 1)), atol=5e-6)
    assert (local.run([[]], freeze, readouts=readouts, features=[0]).readout_RxK == readouts.value_K).all()


@pytest.mark.usefixtures("cold_programs")
def test_with_another_prompts_tokens_under_the_frozen_constants_edges_are_the_same(traced, monkeypatch):
    local, _, readouts, graph = traced
    active = local.active
    other_T = np.pad([88, 3, 61, 12, 240, 7], (0, local.stream_LxTxD.shape[1] - len(IDS)))
    other_TxD = embed(local.frozen, local.model.params, other_T)

    real, starts = layers.run_layer, []

    def run_layer(frozen, freeze, params, layer, x_BxTxD, *rest):
        if not starts:  # the rows enter layer 0 with the other prompt's tokens
            starts.append(layer)
            x_BxTxD = jnp.concatenate([x_BxTxD[:1], jnp.tile(other_TxD[None], (len(x_BxTxD) - 1, 1, 1))])
        return real(frozen, freeze, params, layer, x_BxTxD, *rest)

    monkeypatch.setattr(layers, "run_layer", run_layer)
    chosen = np.linspace(0, len(active) - 1, 8).astype(int)
    columns = zip(
        *(getattr(active, name)[chosen].tolist() for name in ("layer_A", "position_A", "feature_A")), strict=True
    )
    raised = [[Change(*place, 65 * float(active.value_A[a]))] for a, place in zip(chosen, columns, strict=True)]
    changed = local.run([[], *raised], "all", readouts=readouts, features=range(len(active)))
    assert starts == [0]
    seen_RxT = np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1)
    assert np.abs(seen_RxT[0, -4:] - readouts.value_K).max() > 0.05  # the tokens do make a difference
    edge_RxT = graph.adjacency_RxS[:, chosen].T
    assert np.abs(edge_RxT).max() > 0.01
    moved_RxT = (seen_RxT[1:] - seen_RxT[:1]) / 64
    assert np.abs(moved_RxT - edge_RxT).max() < 3e-6 * np.abs(edge_RxT).max()


def test_with_all_held_a_change_is_its_edge(traced):
    local, _, readouts, graph = traced
    doubling = double(local, graph, readouts, 12)
    assert doubling.held_error < 3e-6
    assert np.abs(doubling.edge_ExR).max() > 0.01
    assert np.abs(doubling.free_ExR - doubling.edge_ExR).max() > 1e-3  # norms, attention and MLPs do react
    found = doubling.results.free
    assert 0 < found.pearson <= 1 and found.sign > 0.5


def test_attention_can_be_held_alone(traced):
    local, _, readouts, _ = traced
    rows = some_rows(local, np.random.default_rng(2))
    free, attention, held = (local.run(rows, freeze, readouts=readouts).readout_RxK for freeze in FREEZE_MODES[:3])
    assert np.abs(free - attention).max() > 1e-4 and np.abs(held - attention).max() > 1e-4
    at_last = [[change for change in row if change.position == len(IDS) - 1 and change.layer == 3] for row in rows]
    # A change in the last layer at the last position meets no further attention.
    free, attention = (local.run(at_last, freeze, readouts=readouts).readout_RxK for freeze in FREEZE_MODES[:2])
    np.testing.assert_allclose(free, attention, atol=1e-6)


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
        traced[0].run(rows, readouts=traced[2])
    with pytest.raises(UserError, match="expected one of none, attention, all, constrained"):
        traced[0].run([], "most", readouts=traced[2])


def test_slices_the_first_position_and_all_logits_as_with_hooks_in_torch(traced, lm):
    """A feature at every position, also at the first, where it has the activation 0 before."""
    import torch

    from saejax.models import source

    local, transcoders, readouts, _ = traced
    row = [Change(1, slice(None), 3, 2.0)]
    changed = local.run([row, []], readouts=readouts)
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
    np.testing.assert_allclose(local.run([[]], readouts=readouts).logits_RxV[0], local.logits_V)


def test_constrained_is_all_held_below_a_layer_but_for_norms(traced, lm):
    """As circuit-tracer has it: of all layers it is "all"; of some, MLPs are held there, attention everywhere."""
    import torch

    from saejax.models import source

    local, transcoders, readouts, _ = traced
    rows = [[Change(0, 2, 3, 2.0)], [Change(1, 3, 5, 1.0), Change(0, 4, 1, 0.5)]]
    held, constrained = (local.run(rows, freeze, readouts=readouts) for freeze in ("all", "constrained"))
    np.testing.assert_array_equal(held.readout_RxK, constrained.readout_RxK)
    some = local.run(rows[:1], "constrained", readouts=readouts, freeze_until=2)
    if transcoders[0].config.skip:
        return
    model = source.load_torch_model(lm.source, "float32").double()
    model.set_attn_implementation("eager")
    clean, patterns = {}, []
    softmax = torch.nn.functional.softmax
    active = local.active
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
        local.run(rows[1:], "constrained", readouts=readouts, freeze_until=1)


def test_a_prompt_is_continued_with_changes_as_with_hooks_in_torch(traced, lm):
    import torch

    from saejax.models import source

    local, transcoders, *_ = traced
    changes = [Change(1, slice(3, None), 3, 2.0), Change(2, 2, 5, 1.5), Change(2, slice(0, 2), 5, 1.0)]
    found = local.generate(changes, 4)
    assert found.ids_N.tolist() == found.logits_NxV.argmax(axis=1).tolist() and len(found.ids_N) == 4
    model = source.load_torch_model(lm.source, "float32").double()

    def write(layer, feature, value_of):
        def hook(module, inputs, output):
            acts_T = np.asarray(transcoders[layer].encode(np.asarray(inputs[0][0].numpy(), np.float32)))[:, feature]
            moved_T = [value_of.get(t, value_of.get("on") if t >= 3 else None) for t in range(len(acts_T))]
            own_T = np.where(np.arange(len(acts_T)) > 0, acts_T, 0)
            added_T = [0 if value is None else value - own for value, own in zip(moved_T, own_T, strict=True)]
            direction_D = np.array(transcoders[layer].W_dec_FxD[...])[feature]
            return output + torch.from_numpy(np.array(added_T)[:, None] * direction_D).double()[None]

        return model.model.layers[layer].mlp.register_forward_hook(hook)

    write(1, 3, {"on": 2.0})
    write(2, 5, {0: 1.0, 1: 1.0, 2: 1.5})
    ids = list(IDS)
    for logits_V in found.logits_NxV:
        with torch.no_grad():
            np.testing.assert_allclose(logits_V, model(torch.tensor([ids])).logits[0, -1], atol=3e-5)
        ids.append(int(logits_V.argmax()))


def test_attention_may_be_held_while_a_prompt_is_continued(traced, lm):
    local, _, readouts, _ = traced
    row = [Change(0, 2, 3, 4.0), Change(1, 3, 5, 3.0)]
    free, held = (local.generate(row, 2, freeze) for freeze in ("none", "attention"))
    for found, freeze in ((free, "none"), (held, "attention")):
        wanted_V = local.run([row], freeze, readouts=readouts).logits_RxV[0]
        np.testing.assert_allclose(found.logits_NxV[0], wanted_V, atol=1e-5)
    assert np.abs(free.logits_NxV[0] - held.logits_NxV[0]).max() > 1e-4
    tokens = Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32))
    (plain,) = lm.generate(tokens, 3)
    assert local.generate([], 3, "attention").ids_N.tolist()[: len(plain.ids)] == list(plain.ids)
    with pytest.raises(UserError, match="freeze is 'all'"):
        local.generate(row, 2, "all")


def test_everything_kept_is_the_model_and_parts_are_between(traced):
    local, _, readouts, graph = traced
    if (readouts.layer_K != local.model.config.n_layers).any():
        readouts = read_targets(local, [7], 10, 0.95)
        graph = trace(local.model, local.dictionaries, IDS, targets=[7])
    found = faithfulness_curve(local, graph, readouts, (0.3, 0.8, 1.0))
    np.testing.assert_allclose(found.model, readouts.value_K[0], atol=1e-5)
    assert found.features[0] < found.features[1] < found.features[2]
    assert abs(found.model - found.empty) > 0.01
    every = Circuit(np.ones(len(local.active), bool), np.ones((4, len(IDS)), bool))
    np.testing.assert_allclose(
        local.run([every, every.complement()], readouts=readouts).readout_RxK[:, 0],
        [found.model, found.empty],
        atol=1e-5,
    )


def test_a_curve_that_is_not_defined_is_json(traced, monkeypatch):
    local, _, readouts, graph = traced
    readouts = read_targets(local, [7], 10, 0.95)
    flat = lambda self, rows, **rest: LocalRun(None, np.ones((len(rows), 1), np.float32))  # noqa: E731
    monkeypatch.setattr(LocalModel, "run", flat)
    checked = json.loads(json.dumps(to_json(faithfulness_curve(local, graph, readouts, (0.3, 0.8))), allow_nan=False))
    assert checked["faithfulness"] == [None, None] == checked["incompleteness"] and checked["readout"] == [1.0, 1.0]


def test_everything_kept_is_the_model_with_sinks_too(lm):
    """At a sink no feature is used, and all that the MLP adds but the decoder's bias is the error."""
    tokens = Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32))
    made = []
    for transcoder in made_set(lm):
        norm_T = np.linalg.norm(np.asarray(lm(tokens, capture=[transcoder.site]).sites[transcoder.site])[0], axis=-1)
        config = dataclasses.replace(transcoder.config, max_norm=float(np.sort(norm_T[1:])[-2:].mean()))
        made.append(Dictionary(config, **transcoder.arrays))
    local = LocalModel(lm, LayerTranscoders.of(made), np.array(IDS))
    sinks_LxP = np.ones((4, len(IDS)), bool)
    sinks_LxP[local.active.layer_A, local.active.position_A] = False
    assert (sinks_LxP[:, 1:].sum(axis=1) == 1).all()
    readouts = read_targets(local, [7], 10, 0.95)
    every = Circuit(np.ones(len(local.active), bool), np.ones((4, len(IDS)), bool))
    kept = local.run([every], readouts=readouts).readout_RxK[0, 0]
    np.testing.assert_allclose(kept, readouts.value_K[0], atol=1e-6)

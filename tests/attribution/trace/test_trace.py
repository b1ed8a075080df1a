"""Tracing: targets, how many features are kept, devices, and what is refused."""

import dataclasses
import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from made_graphs import IDS, make_transcoders
from torch_sites import relative_error

from saejax import trace
from saejax.attribution.checks import scale
from saejax.attribution.forms.neuronpedia import to_document
from saejax.attribution.graph import pruning
from saejax.attribution.graph.data import BIAS, ERROR, FEATURE, FIRST_MLP, LOGIT, TOKEN, Nodes
from saejax.attribution.local import rows, state
from saejax.attribution.local.rows import Direction, Readouts
from saejax.attribution.local.state import Active
from saejax.attribution.trace import prompt
from saejax.attribution.trace.prompt import trace_prompt
from saejax.errors import UserError
from saejax.models.loading import load_model
from saejax.models.tokens import token_text
from saejax.parallel.mesh import AXES


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def made(tiny):
    return make_transcoders(tiny.config, "standard", skip=True)


@pytest.fixture(scope="module")
def graph(tiny, made):
    return trace(tiny, made, IDS, max_logits=4)


def test_one_device_and_eight_agree_and_batches_of_any_length(tiny, made, graph, monkeypatch):
    mesh = Mesh(np.array(jax.devices()).reshape(1, 4, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    split = trace(load_model(str(tiny.source.folder), mesh=mesh), made, IDS, max_logits=4)
    assert np.array_equal(split.nodes.index_N, graph.nodes.index_N)
    assert relative_error(split.adjacency_RxS, graph.adjacency_RxS) < 1e-5
    assert np.array_equal(split.prune().pruning.node_N, graph.prune().pruning.node_N)

    monkeypatch.setattr(rows, "TOKENS", dict(cpu=24))
    monkeypatch.setattr(rows, "CHUNKS", 3)
    assert relative_error(trace(tiny, made, IDS, max_logits=4).adjacency_RxS, graph.adjacency_RxS) < 1e-6


def test_the_difference_of_two_logits_is_taken_after_tracing(tiny, made, graph):
    (first, _), (second, _) = graph.settings["targets"][:2]
    wanted = trace(tiny, made, IDS, targets=[(first, second)])
    found = graph.difference(*graph.labels[:2])
    assert (found.labels, found.settings["targets"]) == (wanted.labels, wanted.settings["targets"])
    for name in ("kind_N", "layer_N", "position_N", "index_N", "value_N"):
        np.testing.assert_array_equal(getattr(found.nodes, name), getattr(wanted.nodes, name), name)
    for name in ("adjacency_RxS", "value_R", "constant_R", "logit_K"):
        assert relative_error(getattr(found, name), getattr(wanted, name)) < 1e-5, name
    assert np.array_equal(found.prune().pruning.node_N, wanted.prune().pruning.node_N)
    for graph_, labels in ((graph, (graph.labels[0], "nothing")), (found, found.labels * 2), (graph.prune(), "ab")):
        with pytest.raises(UserError, match="two logits of this graph|is pruned"):
            graph_.difference(*labels)


def test_directions_are_explained_by_their_names(tiny_model):
    """One that is a logit's has its edges; of another, edges, biases and errors add up to its value."""
    lm = tiny_model("gpt2")  # whose final norm has a bias
    made, params = make_transcoders(lm.config), lm.params
    unembed_DxV = params["embed_VxD"].T if lm.config.tied else params["unembed_DxV"]
    like_7_D = np.asarray(unembed_DxV[:, 7] - unembed_DxV.mean(axis=1))
    probe_D = np.random.default_rng(0).normal(size=lm.config.d_model).astype(np.float32)
    targets = [7, Direction("like 7", like_7_D), (7, 9), Direction("probe", probe_D)]
    traced = trace_prompt(lm, made, IDS, targets=targets)
    graph, rows = traced.graph, traced.graph.adjacency_RxS[-4:]
    assert graph.labels[1::2] == ("like 7", "probe") and graph.ids[-3:] == [
        f"{lm.config.n_layers + 1}_-{k}_6" for k in (1, 2, 3)
    ]
    assert graph.settings["targets"] == [[7, -1], [-1, -1], [7, 9], [-1, -1]]
    assert relative_error(rows[1], rows[0]) < 1e-5 and graph.value_R[-3] == pytest.approx(graph.value_R[-4], abs=1e-5)
    assert graph.probability_K[1:].tolist() == [1, 1, 1] and graph.logit_K[3] == graph.value_R[-1]
    assert np.abs(graph.unexplained_R).max() < 1e-5 * np.abs(graph.value_R).max()
    # A run with a feature changed reads the direction at the same place.
    node = graph.nodes[graph.slice_of(FEATURE)][-1:]
    (moved_K,) = traced.local.run([scale(node, 2.0)], "all", readouts=traced.readouts).readout_RxK
    edge_K = graph.adjacency_RxS[-4:, graph.count(FEATURE) - 1]
    np.testing.assert_allclose(moved_K - traced.readouts.value_K, edge_K, atol=1e-5)
    names = [node["clerp"] for node in to_document(graph.prune(), "one")["nodes"] if node["feature_type"] == "logit"]
    assert names[3] == 'Output "probe" (p=1.000)'
    with pytest.raises(UserError, match="not two logits of this graph"):
        graph.difference(graph.labels[0], "probe")
    for vector_D in (probe_D[:-1], probe_D * np.nan):
        with pytest.raises(
            UserError, match=f"the direction 'probe' has the shape .*{lm.config.d_model} finite numbers"
        ):
            trace(lm, made, IDS, targets=Direction("probe", vector_D))
    with pytest.raises(UserError, match="two directions are called 'probe'"):
        trace(lm, made, IDS, targets=[Direction("probe", probe_D), Direction("probe", -probe_D)])


def test_a_difference_is_of_tokens_that_their_texts_name_alone(tiny, made):
    """A direction may be called as a token is, and two tokens may have one text."""
    named = token_text(tiny.tokenizer)(7)
    graph = trace(tiny, made, IDS, targets=[Direction(named, np.ones(tiny.config.d_model)), 7, 9])
    wanted = trace(tiny, made, IDS, targets=[(7, 9)])
    found = graph.difference(graph.labels[1], graph.labels[2])
    assert graph.labels[0] == graph.labels[1] and found.settings["targets"] == [[7, 9]]
    assert relative_error(found.adjacency_RxS, wanted.adjacency_RxS) < 1e-5
    same = dataclasses.replace(graph, labels=(named, named, named))
    with pytest.raises(UserError, match="not two logits of this graph"):
        same.difference(named, named)
    same = dataclasses.replace(trace(tiny, made, IDS, targets=[7, 9, 11]), labels=("a", "a", "b"))
    with pytest.raises(UserError, match="'a' is the text of the tokens 7, 9 of this graph: trace the pair of ids"):
        same.difference("b", "a")


def test_columns_that_are_given_up_change_no_row(tiny, made, monkeypatch):
    options = dict(max_logits=4, max_features=40)
    whole, narrowed, narrow = trace(tiny, made, IDS, **options), [], prompt.RowStore.narrow
    for name, value in dict(_LEAST=60, _LEAST_ROWS=20, _SPARE=1, WHOLE=1000).items():
        monkeypatch.setattr(prompt, name, value)

    def count(store, *args):
        narrowed.append(len(store.column_C))
        narrow(store, *args)

    monkeypatch.setattr(prompt.RowStore, "narrow", count)
    graph = trace(tiny, made, IDS, **options)
    assert narrowed == [len(whole.nodes) - 44 + whole.settings["active_features"]]  # once, when all had a column
    assert np.array_equal(graph.nodes.index_N, whole.nodes.index_N)
    assert relative_error(graph.adjacency_RxS, whole.adjacency_RxS) < 1e-6
    assert relative_error(graph.untraced_R, whole.untraced_R) < 1e-5


def test_the_most_influential_features_are_kept(tiny, made, graph):
    count, most = graph.count(FEATURE), 20
    part = trace(tiny, made, IDS, max_logits=4, max_features=most)
    assert part.count(FEATURE) == most and part.settings["active_features"] == count
    # By definition: in rounds of five, the features with the largest influence through those that were taken.
    taken: list[int] = []
    layer_T, weight_T = graph.nodes.layer_N[graph.target_R], np.r_[np.zeros(count), graph.probability_K]
    while len(taken) < most:
        known = np.isin(np.arange(len(layer_T)), taken) | (np.arange(len(layer_T)) >= count)
        column_T = np.where(np.arange(len(layer_T)) < count, np.arange(len(layer_T)), -1)
        matrix = np.where(known[:, None], graph.adjacency_RxS, 0)
        influence = pruning.influence(matrix, layer_T, column_T, weight_T)[:count]
        taken += [i for i in np.argsort(-influence, kind="stable") if i not in taken][:5]
    kept = np.sort(taken)
    assert np.array_equal(part.nodes.index_N[:most], graph.nodes.index_N[kept])
    columns = np.r_[kept, np.arange(count, graph.adjacency_RxS.shape[1])]
    targets = np.r_[kept, np.arange(count, len(graph.target_R))]
    assert relative_error(part.adjacency_RxS, graph.adjacency_RxS[np.ix_(targets, columns)]) < 1e-6
    assert np.abs(part.unexplained_R).max() < 1e-5 * np.abs(part.value_R).max()


def test_biases_have_no_part_in_the_choice_and_rounds_see_more_than_one_ranking(monkeypatch):
    """Of two layers of features: those below act through those above, which one ranking from the logit does not see."""
    rng = np.random.default_rng(3)
    matrix_RxS = np.zeros((41, 44), np.float32)  # 40 features and a logit; after the features two tokens and two biases
    matrix_RxS[40, 20:40] = rng.exponential(size=20) ** 2
    matrix_RxS[20:40, :20] = rng.exponential(size=(20, 20)) ** 4
    matrix_RxS[40, :20] = 0.02 * rng.exponential(size=20)
    layer_A = np.repeat([0, 1], 20).astype(np.int32)
    columns = np.r_[np.arange(40), -1]
    whole_S = pruning.influence(matrix_RxS[:, :42], np.r_[layer_A, 2], columns, np.r_[np.zeros(40), 1.0])
    best = set(np.argsort(-whole_S[:40])[:12].tolist())
    nodes = Nodes.joined(Nodes.of(FEATURE, layer_A, 1), Nodes.of(TOKEN, -1, [0, 1]), Nodes.of(BIAS, [0, 1], 0))
    active = Active(layer_A, *(np.zeros(40) for _ in range(4)))
    run = SimpleNamespace(active=active, model=SimpleNamespace(config=SimpleNamespace(n_layers=2)))
    readouts = Readouts(*[None] * 5, weight_K=np.ones(1), logit_K=None, labels=("one",))

    def chosen(biases=0.0):
        rows = matrix_RxS.copy()
        rows[:, 42:] = biases * rng.exponential(size=(41, 2))

        def fill(new_F, put):
            own = np.array([40]) if new_F is None else new_F
            put(np.arange(len(own)), rows[own])

        return prompt.attribute_in_rounds(run, nodes, readouts, fill, 12)[0].tolist()

    several = chosen()
    assert several == chosen(biases=1e4)
    monkeypatch.setattr(prompt, "ROUNDS", 1)
    assert len(best & set(several)) > len(best & set(chosen()))


def test_a_difference_is_the_difference_of_its_rows(tiny, made, graph):
    a, b = (int(token) for token in graph.nodes.index_N[graph.slice_of(LOGIT)][:2])
    part = trace(tiny, made, IDS, targets=[(a, b), a])
    count = graph.count(FEATURE)
    assert relative_error(part.adjacency_RxS[count], graph.adjacency_RxS[count] - graph.adjacency_RxS[count + 1]) < 1e-5
    assert relative_error(part.adjacency_RxS[count + 1], graph.adjacency_RxS[count]) < 1e-6
    assert " - " in part.labels[0] and part.settings["targets"] == [[a, b], [a, -1]]
    assert part.nodes.index_N[part.slice_of(LOGIT)].tolist() == [-1, a]
    assert part.logit_K[0] == pytest.approx(graph.logit_K[0] - graph.logit_K[1], rel=1e-4)
    assert np.abs(part.unexplained_R).max() < 1e-5 * np.abs(part.value_R).max()


def test_the_phases_of_a_trace_are_logged(tiny, made, caplog):
    with caplog.at_level(logging.INFO, "absl"):
        trace(tiny, made, IDS, max_features=8, max_logits=2)
    phases = [message for message in caplog.messages if "phase" in message]
    assert [message.split(" took ")[0] for message in phases[1::2]] == [f"trace, phase {n} of 4" for n in range(1, 5)]
    assert phases[4].startswith("trace, phase 3 of 4: rows of 2 targets and 8 of ")
    rounds = [message for message in caplog.messages if "pulled back" in message]
    assert len(rounds) == 4 and rounds[3] == "trace: 6 of 8 features have rows, the next 2 are pulled back"


@pytest.mark.parametrize(
    "prompt,settings,message",
    [
        ([5], {}, "the prompt is 1 token, and no feature is used at the first token: expected a longer one"),
        ([], {}, "the prompt is empty"),
        ("The \ud800 cat", {}, "has an unpaired surrogate: expected valid Unicode"),  # of bytes that are no UTF-8
        (IDS, dict(targets=["\udcff"]), "has an unpaired surrogate"),
        ("", {}, "the prompt is empty: expected a text, or token ids"),
        (IDS, dict(targets=["cat near the"]), "is [0-9]+ tokens, 'c.*: expected one, such as the first"),
        (IDS, dict(targets=[400]), "token 400 does not exist: expected 0 to 383"),
        (IDS, dict(targets=[7.5]), "token 7.5 does not exist"),
        (IDS, dict(targets=[7, (7, 8), 7]), "the target 7 appears twice"),
        (IDS, dict(targets=[(7, 7)]), "no difference of two logits: expected two tokens that differ"),
        (IDS, dict(targets=[(7, 8, 9)]), "no difference of two logits"),
        (IDS, dict(logit_mass=95), "logit_mass 95: expected 1 or more, and a probability"),
        (IDS, dict(max_logits=0), "max_logits is 0"),
        (IDS, dict(max_logits=2.5), "max_logits is 2.5"),
        (IDS, dict(max_features=0), "max_features is 0"),
        (IDS, dict(max_features=2.5), "max_features is 2.5"),
        ([5.7, 8.0], {}, "expected a text, or the token ids of one"),
        ([IDS, IDS], {}, "expected a text, or the token ids of one"),
        (["The", "cat"], {}, "expected a text, or the token ids of one"),
        ([0, 999], {}, "token ids are 0 to 999"),
        ([0, 2**32 + 5], {}, "token ids are 0 to 2147483647"),
        ([0] * 100, {}, "100 tokens: expected 1 to 64"),
    ],
)
def test_what_cannot_be_traced_is_refused(prompt, settings, message, tiny, made):
    with pytest.raises(UserError, match=message):
        trace_prompt(tiny, made, prompt, **settings)


@pytest.mark.parametrize("target", [" the", 7])
def test_one_target_needs_no_list(target, tiny, made):
    """Else a text would be a target for each of its letters."""
    alone, listed = (trace(tiny, made, IDS, targets=targets, max_features=5) for targets in (target, [target]))
    assert alone.labels == listed.labels and len(alone.labels) == 1
    assert len(trace(tiny, made, IDS, targets=np.array([7, 8]), max_features=5).labels) == 2


@pytest.mark.parametrize("name", ["W_enc_DxF", "b_enc_F", "W_dec_FxD", "b_dec_D", "W_skip_DxD"])
def test_a_transcoder_with_values_that_are_no_numbers_is_named(name, tiny, made):
    broken = np.array(made[1].arrays[name])
    broken.flat[3] = np.nan
    damaged = [made[0], type(made[1])(made[1].config, **{**made[1].arrays, name: broken}), *made[2:]]
    with pytest.raises(UserError, match="layer 1: what the transcoder gives is not finite: its file is") as error:
        trace(tiny, damaged, IDS)
    assert "\n" not in str(error.value)


def test_a_set_without_active_features_is_refused(tiny, made):
    silent = [type(t)(t.config, **{**t.arrays, "b_enc_F": t.arrays["b_enc_F"] - 1e4}) for t in made]
    with pytest.raises(UserError, match="no feature of .* is active"):
        trace(tiny, silent, IDS)


def test_a_chat_prefix_of_sinks_has_no_features_and_sums_stay_whole(tiny_model, monkeypatch):
    """Of Gemma 3's template the first four tokens; biases and decoders go on from the fifth."""
    lm = tiny_model("gemma3_text", num_hidden_layers=2)
    assert state.CHAT_STARTS[lm.config.family] == (2, 105, 2364, 107)
    made = make_transcoders(lm.config)
    plain = trace(lm, made, IDS, max_logits=2)
    monkeypatch.setitem(state.CHAT_STARTS, lm.config.family, tuple(IDS[:4]))
    found = trace_prompt(lm, made, IDS, max_logits=2)
    graph = found.graph
    assert (plain.nodes.position_N[plain.slice_of(FEATURE)].min(), found.local.first) == (1, 4)
    features, errors = (graph.nodes[graph.slice_of(kind)] for kind in (FEATURE, ERROR))
    assert features.position_N.min() == 4
    assert not graph.adjacency_RxS[:, graph.slice_of(ERROR)][:, errors.position_N < 4].any()
    assert graph.adjacency_RxS[:, graph.slice_of(FIRST_MLP)].any(axis=0).any()
    assert np.abs(graph.unexplained_R).max() < 1e-5 * np.abs(graph.value_R).max()
    with pytest.raises(UserError, match="no feature is used at the first 4 tokens"):
        trace(lm, made, IDS[:4])


def test_a_text_begins_with_a_special_token_or_stands_in_the_chat_template(tiny, made, monkeypatch):
    begun = [each.with_config(dataclasses.replace(each.config, bos="always")) for each in made]
    text = trace(tiny, begun, "The cat near the dogs", max_logits=2)
    assert text.tokens[0] == "<end>" and "".join(text.tokens[1:]) == text.prompt == "The cat near the dogs"
    assert trace(tiny, begun, "<end>The cat", max_logits=2).ids_P[1] != text.ids_P[0]
    assert "".join(trace(tiny, made, "The cat near the dogs", max_logits=2).tokens) == text.prompt
    with pytest.raises(UserError, match="has no chat template: leave --model.chat_template out"):
        trace(tiny, made, "The war", chat=True)
    for template, reason in (("{{ raise_exception('no users') }}", "no users"), ("{% for m in", "unexpected .*")):
        monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
        with pytest.raises(UserError, match=rf"messages of a chat \({reason}\): leave --model.chat_template out"):
            trace(tiny, made, "The war", chat=True)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    graph = trace(tiny, made, "The war", chat=True, max_logits=2)
    assert "".join(graph.tokens) == "<user>The war>" and graph.prompt == "The war"
    assert trace(tiny, made, IDS, chat=True, max_logits=2).ids_P.tolist() == IDS

"""Transformers set by hand: they do what their description says, and graphs have the edges that they have."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import flag_file, make_configs
from transformers import PreTrainedTokenizerFast

from saejax import load_model, load_results
from saejax.activations.in_memory import capture
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.dictionaries.names import folder_name
from saejax.errors import UserError
from saejax.ground_truth.circuits import judge
from saejax.ground_truth.circuits.cases import CASES, make_case
from saejax.ground_truth.circuits.dictionaries import EXACT, WRONG, order, untrained_sets, without_silent_tokens
from saejax.ground_truth.circuits.edges import Edges, aligned, circuit, judge_edges, known_edges, possible
from saejax.ground_truth.circuits.handset import checkpoint, run
from saejax.ground_truth.circuits.judge import judge_features, matched_neurons
from saejax.ground_truth.hub_folder import save_model
from saejax.models import source
from saejax.runner import command
from saejax.runner.pipeline import run_stages
from saejax.runner.registry import all_stages, default_configs
from saejax.stages.algorithm.settings import AlgorithmConfig
from saejax.stages.known_circuits.report import holds, line
from saejax.stages.known_circuits.settings import CIRCUITS, KnownConfig
from saejax.tasks.behaviours import read_prompts, write_prompts
from saejax.tasks.labels import label_prompts
from saejax.tasks.own_prompts import as_line, read_own_prompts
from saejax.tasks.settings import TaskConfig

pytestmark = pytest.mark.usefixtures("two_devices")

SEED = 3


def answers(prompt):
    return prompt.correct.strip(), prompt.wrong.strip()


@pytest.fixture(scope="module", params=CIRCUITS)
def case_and_model(request, tmp_path_factory, one_device):
    """A case, and the transformer that was made of it."""
    case, folder = make_case(request.param, 10, SEED), tmp_path_factory.mktemp("case_and_model")
    save_model(folder, *checkpoint(case.model, SEED), list(case.model.words))
    return case, load_model(str(folder), mesh=one_device)


@pytest.mark.parametrize("name", CASES)
def test_descriptions_answer_their_prompts_and_edges_and_biases_make_what_neurons_read(name):
    """All edges of a target, and its bias, against the pre-activation that the whole run gives."""
    case = make_case(name, 10, SEED)
    model, words = case.model, list(case.model.words)
    assert len({(prompt.behaviour, prompt.text) for prompt in case.prompts}) == len(case.prompts)

    def logit_difference(logits_V, prompt):
        right, wrong = (logits_V[words.index(word)] for word in answers(prompt))
        return right - wrong

    for prompt in case.prompts:
        for text, sign in ((prompt.text, 1), (prompt.counterpart, -1)):
            assert not text or sign * logit_difference(run(model, text).logits_V, prompt) > 1
    prompt = case.prompts[-1]
    whole, edges = run(model, prompt.text), known_edges(model, prompt)
    assert len(edges.targets) > 1
    for (layer, position, neuron), total in zip(edges.targets[:-1], edges.weight_SxR.sum(0), strict=False):
        bias = model.layers[layer].neurons[neuron].bias
        assert total + bias == pytest.approx(whole.acts[layer][position, neuron])
    assert edges.weight_SxR[:, -1].sum() == pytest.approx(logit_difference(whole.logits_V, prompt))


def test_a_circuit_is_what_leads_to_the_logit():
    word, start, low, idle, logit = (-1, 1, -1), (-1, 2, -1), (0, 2, 0), (0, 2, 1), (1, 2, -1)
    weight_SxR = np.array([[2.0, 1.0, 0.0], [0.01, 3.0, 0.0], [0.0, 0.0, -4.0], [0.0, 0.0, 0.001]])
    edges = Edges((word, start, low, idle), (low, idle, logit), weight_SxR)
    assert circuit(edges, 0.1) == {(word, low), (low, logit)}
    assert circuit(edges, 1e-4) == {(word, low), (start, low), (low, logit), (word, idle), (start, idle), (idle, logit)}
    assert possible(edges)[2].tolist() == [False, False, True]
    assert aligned(edges, (idle, (5, 5, 5)), (logit, word)).tolist() == [[0.001, 0.0], [0.0, 0.0]]


def test_the_transformer_is_its_description_here_and_in_transformers(case_and_model):
    case, model = case_and_model
    texts = list(dict.fromkeys(prompt.text for prompt in case.prompts))[:4]
    wanted_BxV = np.stack([run(case.model, text).logits_V for text in texts])
    tokens = model.tokenize(texts)
    ours_BxTxV = np.asarray(model(tokens).logits_BxTxV)
    ids, lengths = (torch.from_numpy(array.astype(np.int64)) for array in (tokens.ids_BxT, tokens.lengths_B))
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    with torch.inference_mode():
        output = source.load_torch_model(model.source)(input_ids=ids, attention_mask=mask, use_cache=False)
    torch_BxTxV = output.logits.float().numpy()
    for logits_BxTxV in (ours_BxTxV, torch_BxTxV):
        np.testing.assert_allclose(logits_BxTxV[range(len(texts)), tokens.last_B], wanted_BxV, atol=2e-5)


@pytest.mark.parametrize("case_and_model", ["induction", pytest.param("logic", marks=pytest.mark.slow)], indirect=True)
def test_graphs_have_the_known_edges_and_wrong_decoders_have_others(case_and_model):
    case, model = case_and_model
    layers = range(len(case.model.layers))
    sets = [untrained_sets(case, model, layer, SEED) for layer in layers]
    orders = [order(case, layer, SEED).tolist() for layer in layers]
    assert len(set(map(tuple, orders))) == len(layers), "each layer is shuffled by itself"
    neuron_of = {(layer, f): neuron for layer in layers for f, neuron in enumerate(orders[layer])}
    prompts = [prompt for prompt in case.prompts if prompt.split == "test"][:2]
    exact, wrong = (
        judge_edges(model, LayerTranscoders.of([each[name] for each in sets]), case.model, prompts, neuron_of)
        for name in (EXACT, WRONG)
    )
    assert exact.error < 1e-5
    assert exact.auroc.mean == exact.precision.mean == exact.recall.mean == 1
    assert exact.replacement.mean > 0.95
    assert wrong.error > 0.1 and wrong.recall.mean < 0.9 and wrong.replacement.mean < 0.9


@pytest.mark.parametrize("case_and_model", ["induction", pytest.param("logic", marks=pytest.mark.slow)], indirect=True)
def test_exact_features_stand_for_the_variables_and_wrong_decoders_for_nothing(case_and_model):
    case, model = case_and_model
    sets = [untrained_sets(case, model, layer, SEED) for layer in range(len(case.model.layers))]
    few = dict(list(case.causes.items())[:2])  # the stage judges all three of logic, in twice the time
    prompts = tuple(prompt for prompt in case.prompts if prompt.behaviour in few)
    case = dataclasses.replace(case, causes=few, prompts=prompts)
    exact = LayerTranscoders.of([each[EXACT] for each in sets])
    neuron_of, recovered = matched_neurons(case, exact, SEED)
    feature_of = {neuron: feature for (layer, feature), neuron in neuron_of.items() if layer == case.layer}
    idle = {name: [feature_of[neuron] for neuron in neurons] for name, neurons in case.idle.items()}
    judged = judge_features(model, sets[case.layer][EXACT], case, idle)
    assert recovered == 1 and judged.behaviours == judged.carried == len(case.causes)
    assert judged.interchange.mean == 1 and (judged.idle, judged.idle_claimed) == (1, 0)
    assert judged.interchange_random is None or judged.interchange_random < 0.5
    # A list that reaches the dose costs fewer answers than the variable's own features.
    if len(case.causes) > 1:  # in induction answers without the variable are a tie, which rounding decides
        assert judged.accuracy_drop_random is None or judged.accuracy_drop_random < judged.accuracy_drop
    wrong = judge_features(model, sets[case.layer][WRONG], case, {})
    assert wrong.carried == wrong.shown == 0 and wrong.interchange.mean < 0.5


def test_random_lists_turn_the_mean_share_of_answers(monkeypatch):
    case = make_case("logic", 30, 0)
    # Whose answers turn with each of N random lists [N, P]; of the third behaviour there are none.
    turned = [[[True, False], [False, False]], [[True, True], [False, True]], np.zeros((0, 2), bool)]
    of_behaviour = dict(zip(case.causes, turned, strict=True))
    table = SimpleNamespace(
        select_prompts=lambda name: name,
        select_whole_edits=lambda name, group: group,
        values=lambda edits, name, _: np.where(of_behaviour[name] if edits == "random" else [[True, True]], -1, 1),
    )
    monkeypatch.setattr(judge, "ablate", lambda *_, **__: SimpleNamespace(table=table))
    monkeypatch.setattr(judge, "_has_effect", lambda ablated, name: True)
    judged = judge_features(None, None, case, {})
    assert judged.interchange.mean == 1 and judged.interchange_random == pytest.approx((0.25 + 0.75) / 2)
    assert judged.accuracy_drop == 1 and judged.accuracy_drop_random == pytest.approx((0.25 + 0.75) / 2)


def test_answers_are_carried_where_most_turn_and_more_than_under_lists_of_the_same_dose():
    all_P, none_NxP = np.ones(40, bool), np.zeros((20, 40), bool)
    assert judge._carries(all_P, none_NxP) and judge._carries(all_P, none_NxP[:0])
    assert not judge._carries(all_P & (np.arange(40) < 10), none_NxP)
    one_NxP, two_NxP = none_NxP.copy(), none_NxP.copy()
    one_NxP[:1], two_NxP[:2] = True, True
    assert judge._carries(all_P, one_NxP) and not judge._carries(all_P, two_NxP)
    # 100 worlds each: the features turn 70 to 100 % of the answers, and so do 79 lists, or only half as many.
    rng, found = np.random.default_rng(0), []
    for of_lists in (1.0, 0.5):
        share_WxN = rng.uniform(0.7, 1, (100, 80)) * np.where(np.arange(80) > 0, of_lists, 1)
        turned_WxNxP = rng.random((100, 80, 40)) < share_WxN[..., None]
        found.append(sum(judge._carries(turned_NxP[0], turned_NxP[1:]) for turned_NxP in turned_WxNxP))
    print(f"answers are carried: yes in {found[0]} of 100 null and {found[1]} of 100 true worlds")
    assert found[0] <= 8 and found[1] >= 80


def test_tokens_on_which_nothing_fires_are_not_in_the_store(case_and_model, tmp_path):
    """A defect: a store of some tokens of its texts could not be written, and the stage ended with an IndexError."""
    case, lm = case_and_model
    sites = [f"mlp_{part}.{layer}" for layer in range(len(case.model.layers)) for part in ("in", "out")]
    acts = capture(lm, list(dict.fromkeys(case.texts(40, 0))), sites)
    kept = without_silent_tokens(acts, sites[1::2])
    store = kept.save(tmp_path / "store")
    rows = store.rows("train", "mlp_in.1")
    assert 0 < len(rows) == len(kept.index_Nx3) <= len(acts.index_Nx3)
    read = {tuple(row) for row in store.read("mlp_in.1", rows)}
    fires_N = np.any([np.abs(acts.values[site]).max(axis=1) > 0 for site in sites[1::2]], axis=0)
    assert read == {tuple(row) for row in acts.values["mlp_in.1"][fires_N]}


@pytest.mark.slow
def test_the_stage_finds_what_is_known(tmp_path):
    changes = dict(known__circuits=("logic",), known__prompts=30, known__graphs=2, mesh__data=2)
    configs = make_configs(task__behaviours=(), **changes)
    run_stages(["known_circuits"], configs, tmp_path)
    results = load_results(tmp_path / "known_circuits" / "logic")
    assert holds(results)
    exact = results.sets[EXACT].causal
    assert exact.interchange.mean == 1
    assert (exact.claimed, exact.carried, exact.shown, exact.idle_claimed) == (3, 3, 3, 0)
    for name in (WRONG, "random"):
        # Removing some directions does more harm than removing others, whatever they are: only both together count.
        assert results.sets[name].causal.shown == 0 and results.sets[name].causal.interchange.mean < 0.2
    assert "YES" in line(dict(logic=results))
    run_stages(["report"], configs, tmp_path)
    assert "Known circuits" in (tmp_path / "report" / "report.md").read_text()
    # The other binaries take the same folders.
    unit = tmp_path / "known_circuits" / "logic"
    dictionary = unit / "transcoders/exact/layer1"
    lines = [
        f"--model.path={unit / 'model'}", "--task.behaviours=", f"--task.prompts={unit / 'prompts.jsonl'}",
        f"--probe.dictionary={dictionary}", "--probe.labels=xor_0",
        f"--graph.transcoders={unit / 'transcoders/exact'}", "--graph.behaviours=xor", "--mesh.data=2",
    ]  # fmt: skip
    flags = [f"--workdir={tmp_path / 'own'}", flag_file(lines, tmp_path)]
    for stage in ("baseline", "probe", "attribute"):
        assert command.run([stage], "", ["program", *flags]) == 0
    graphs = load_results(tmp_path / "own" / "attribute" / "behaviours").graphs
    assert graphs["xor"].scores.replacement > 0.999
    probes = load_results(tmp_path / "own" / "probe" / folder_name(str(dictionary))).labels
    assert {each.label for each in probes} == {"xor_0"}


@pytest.mark.parametrize(
    ("config", "unit"),
    [
        (KnownConfig(circuits=("logic",)), "known_circuits/logic"),
        (AlgorithmConfig(names=("paths",)), "algorithm/paths"),
    ],
)
def test_a_report_of_what_is_made_here_asks_for_no_baseline(config, unit):
    configs = default_configs() | config
    without = configs | dataclasses.replace(configs[TaskConfig], behaviours=())
    assert [*all_stages()["report"].units_read(without, "")] == [unit]
    assert {"baseline", unit} < {*all_stages()["report"].units_read(configs, "")}


def test_prompts_tell_labels_to_probes(tmp_path):
    case = make_case("logic", 30, SEED)
    save_model(tmp_path / "model", *checkpoint(case.model, SEED), list(case.model.words))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(map(as_line, case.prompts)))
    read = read_own_prompts(TaskConfig(behaviours=(), prompts=str(tmp_path / "prompts.jsonl")), tokenizer)
    assert [prompt for prompts in read.values() for prompt in prompts] == list(case.prompts)
    write_prompts(tmp_path / "kept.jsonl", case.prompts)
    assert read_prompts(tmp_path / "kept.jsonl") == list(case.prompts)
    diffs = [1.0] * len(case.prompts)
    for labelled in label_prompts("xor_0", case.prompts, diffs):
        tests = [p for p in case.prompts if (p.behaviour, p.split) == (labelled.behaviour, "test")]
        bits = [prompt.text.split()[:2] for prompt in tests]
        names = list(labelled.classes)
        assert [names[place] for place in labelled.test_class_M] == [str(int(a != b)) for a, b in bits]
    with pytest.raises(UserError, match="unknown label 'xor_2'"):
        label_prompts("xor_2", case.prompts, diffs)

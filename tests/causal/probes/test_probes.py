"""Probes find what was planted and nothing else; the stage end to end; labels that cannot be learned are said."""

import dataclasses
import importlib.resources
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from runs import changed, write_members

from saejax.causal.probes import inputs as probe_inputs
from saejax.causal.probes import run as stage
from saejax.causal.probes.linear import Task, fitted
from saejax.causal.probes.results import ProbeResults
from saejax.dictionaries import Dictionary, save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.interventions.split_model import SplitModel
from saejax.results import from_json, to_json
from saejax.runner.config import Configs
from saejax.runner.workspace import Run
from saejax.settings import PROBE_LABELS, MeshConfig, ModelConfig, ProbeConfig
from saejax.tasks.behaviours import Prompt, PromptScore, write_prompts
from saejax.tasks.labels import LABELS, label_prompts

CONFIG = ProbeConfig(strengths=(0.01, 1.0), sparse=(1, 2), shuffles=4, permutations=200, folds=3)


def _prompt(i: int, split: str, correct: str, behaviour: str = "sums") -> Prompt:
    return Prompt(behaviour, split, f"{split} {i}", correct, " x", "", "", ())


def test_labels():
    assert tuple(LABELS) == PROBE_LABELS
    train = [_prompt(i, "train", answer) for i, answer in enumerate(["7"] * 6 + ["8"] * 5 + ["9"] * 4)]
    prompts = [*train, _prompt(0, "test", "8"), _prompt(1, "test", "9"), _prompt(2, "test", "7")]
    prompts += [_prompt(i, "train", " are" if i % 2 else " is", "verbs") for i in range(10)]
    diffs = [1.0] * 5 + [-1.0] * 13 + [2.0] * 10
    sums, verbs = label_prompts("answer", prompts, diffs)
    assert (sums.name, sums.classes, sums.left_out) == ("answer-sums", {"7": (6, 1), "8": (5, 1)}, {"9": 5})
    assert sums.train_N.tolist() == list(range(11)) and sums.test_M.tolist() == [15, 17]
    assert sums.train_class_N.tolist() == [0] * 6 + [1] * 5 and sums.test_class_M.tolist() == [1, 0]
    assert verbs.reason == "no test prompt is of a class with 5 train prompts" and not len(verbs.train_N)
    parity = label_prompts("parity", prompts, diffs)
    assert parity[0].classes == {"odd": (10, 2), "even": (5, 1)}
    assert parity[1].reason == "no prompt has such a label" and parity[1].unlabelled == 10
    assert label_prompts("number", prompts, diffs)[0].unlabelled == 18
    right, always = label_prompts("correct", prompts, diffs)
    assert right.classes == {"wrong": (10, 3), "right": (5, 0)}
    assert always.reason == "fewer than two classes with 5 train prompts: right 10"
    (every,) = label_prompts("behaviour", prompts, diffs)
    assert every.name == "behaviour" and every.classes == {"sums": (15, 3), "verbs": (10, 0)}


def test_the_noun_beside_the_verb_does_not_say_the_subjects_number():
    """As the prompts are, that noun gives every number away; a probe of nothing but that noun must be guessing."""
    words = json.loads((importlib.resources.files("saejax.tasks") / "data" / "behaviours.json").read_text("utf-8"))
    nouns = list(words["nouns"].items())[:20]
    prompts = []
    for i in range(100):  # as they are in the behaviour: the other noun has the other number
        (subject, beside), plural = (nouns[i % 20], nouns[(7 * i + 3) % 20]), i % 2
        text = f"Everyone knows that the {subject[plural]} near the {beside[1 - plural]}"
        split, verb = "train" if i < 80 else "test", " are" if plural else " is"
        prompts.append(Prompt("agreement", split, text, verb, " x", items=(subject[0], beside[0])))

    def beside_is_plural(some):
        return np.array([prompt.text.split()[-1] in words["nouns"].values() for prompt in some])

    assert (beside_is_plural(prompts) == [prompt.correct == " is" for prompt in prompts]).all()
    (label,) = label_prompts("number", prompts, [1.0] * len(prompts))
    assert label.classes == {"plural": (40, 10), "singular": (40, 10)} and label.congruent == 50
    beside_N = beside_is_plural(label.prompts)
    for places, class_N in ((label.train_N, label.train_class_N), (label.test_M, label.test_class_M)):
        assert beside_N[places][class_N == 0].mean() == beside_N[places][class_N == 1].mean() == 0.5
    task = Task(
        beside_N[label.train_N, None] * 1.0,
        label.train_class_N,
        beside_N[label.test_M, None] * 1.0,
        label.test_class_M,
    )
    assert (fitted(task, 1, 1.0).class_M == task.test_class_M).mean() == 0.5
    # Subjects and what is right stay; other behaviours and prompts of one's own are left as they are.
    for old, new in zip(prompts, label.prompts, strict=True):
        assert (new.correct, new.text.split()[:5]) == (old.correct, old.text.split()[:5])
    own = [dataclasses.replace(prompt, items=()) for prompt in prompts]
    assert label_prompts("number", own, [1.0] * 100)[0].prompts == tuple(own)
    assert label_prompts("answer", prompts, [1.0] * 100)[0].prompts == tuple(prompts)


@pytest.fixture
def make_run(tmp_path, tiny_llama, make_dictionary, make_prompt):
    baseline, train = tmp_path / "baseline", tmp_path / "train" / "topk"
    baseline.mkdir()
    prompts = [
        make_prompt(i, "train" if i < 14 else "test", behaviour) for behaviour in ("first", "second") for i in range(22)
    ]
    scores = [PromptScore(logit_diff=1.0, top1=True, counterpart_logit_diff=None)] * len(prompts)
    write_prompts(baseline / "prompts.jsonl", prompts, scores)
    save_dictionary(train, make_dictionary("resid_post.1"))
    write_members(train, "")

    def make(name, **changes):
        (tmp_path / name).mkdir(exist_ok=True)
        said = []
        probes = dataclasses.replace(CONFIG, labels=("answer", "correct"), shuffles=2)
        configs = Configs(ModelConfig(path=str(tiny_llama)), MeshConfig(), probes)
        inputs = {"baseline": baseline, "train/topk": train}
        return Run("probe", "topk", tmp_path / name, configs, inputs, say=said.append, **changes), said

    return make


def test_the_stage_end_to_end_killed_and_resumed(make_run):
    whole, said = make_run("whole")
    results = stage.run_probe(whole)
    assert from_json(ProbeResults, json.loads(json.dumps(to_json(results), allow_nan=False)), "") == results
    assert (results.dictionary, results.site, results.pool) == ("topk", "resid_post.1", "last")
    answer, again, first, second = results.labels
    assert (answer.label, answer.behaviour) == ("answer", "first") and again.behaviour == "second"
    assert answer.classes == {"runs": dict(train=7, test=4), "the": dict(train=7, test=4)}
    assert [(row.input, row.k) for row in answer.probes] == [
        (name, k) for name in ("features", "raw") for k in (1, 2, None)
    ]
    for label in (first, second):
        assert label.reason == "fewer than two classes with 5 train prompts: right 14" and not label.probes
    assert any("correct-first (3 of 4): no probe: fewer than two classes" in line for line in said)

    rows = pq.read_table(whole.folder / stage.TABLE).to_pylist()
    assert len(rows) == 6 + 6 + 1 + 1
    for row, result in zip(rows[:6], answer.probes, strict=True):
        assert (row["label"], row["behaviour"], row["input"], row["k"]) == (
            "answer",
            "first",
            result.input,
            result.k,
        )
        assert [row[f"accuracy{end}"] for end in ("", "_low", "_high")] == list(vars(result.accuracy).values())
        dense = answer.probes[-1].accuracy.mean
        if result is not answer.probes[-1]:
            assert row["against_dense"] == pytest.approx(result.accuracy.mean - dense)
        assert (row["auc"], row["auc_shuffled"]) == (result.auc.mean, result.auc_shuffled.mean)
        assert (row["p_value"], row["inputs"]) == (result.p_value, list(result.inputs) if result.inputs else None)
    assert rows[-1]["reason"] == second.reason and rows[-1]["accuracy"] is None

    folder = whole.folder.parent / "stopped"
    stopped, _ = make_run("stopped", stopping=lambda: (folder / "answer-first.json").exists())
    with pytest.raises(Interrupted, match="answer-second .2 of 4.: stopped"):
        stage.run_probe(stopped)
    assert not (folder / "answer-second.json").exists()
    resumed, said = make_run("stopped")
    assert stage.run_probe(resumed) == results
    assert said[0] == "probe: kept from an earlier run: answer-first"


@pytest.mark.parametrize(
    "pool,site,target",
    [
        ("last", "resid_post.1", None),
        ("max", "resid_post.1", None),
        ("mean", "resid_post.1", None),
        ("max", "mlp_in.1", "mlp_out.1"),  # a transcoder reads its input
    ],
)
def test_inputs_are_pooled_over_the_positions_that_are_read(tiny, make_dictionary, prompts, plain, pool, site, target):
    dictionary = make_dictionary(site)
    if target:
        config = dataclasses.replace(dictionary.config, target=target, centred=False)
        dictionary = Dictionary(config, **dictionary.arrays | dict(b_dec_D=np.zeros(config.d_in, np.float32)))
    pooled, read_N = probe_inputs.pooled_inputs(SplitModel(tiny, dictionary), prompts, pool)
    tokens = tiny.tokenize([prompt.text for prompt in prompts])
    x_NxTxD = np.asarray(tiny(tokens, capture=[dictionary.site], logits=False).sites[dictionary.site], np.float64)
    for n, length in enumerate(tokens.lengths_B):
        x_TxD = x_NxTxD[n, :length]
        positions = np.flatnonzero(np.linalg.norm(x_TxD, axis=1) <= dictionary.config.max_norm)
        positions = positions[positions == length - 1] if pool == "last" else positions
        assert read_N[n] == bool(len(positions))
        f_TxF = plain(dictionary, prompts[n]).features(x_TxD)
        for found_C, plain_TxC in ((pooled["features"][n], f_TxF), (pooled["raw"][n], x_TxD)):
            some_PxC = plain_TxC[positions] if len(positions) else np.zeros((1, plain_TxC.shape[1]))
            wanted_C = some_PxC.max(axis=0) if pool == "max" else some_PxC.mean(axis=0)
            np.testing.assert_allclose(found_C, wanted_C, atol=2e-4)
    assert not read_N.all() or pool != "last"


def test_what_is_refused(make_run, tiny, make_dictionary, prompts):
    dictionary = make_dictionary("resid_post.1")
    broken = {**dictionary.arrays, "b_enc_F": dictionary.arrays["b_enc_F"].at[7].set(np.nan)}
    with pytest.raises(UserError, match="feature 7 has an activation that is not finite"):
        probe_inputs.pooled_inputs(SplitModel(tiny, Dictionary(dictionary.config, **broken)), prompts, "max")
    run, _ = make_run("refused")
    run = changed(run, labels=("verb",))
    with pytest.raises(UserError, match="unknown label 'verb': expected one of behaviour, answer, parity"):
        stage.run_probe(run)
    run, _ = make_run("refused")
    run = changed(run, strengths=())
    with pytest.raises(UserError, match=r"--probe.strengths is empty"):
        stage.run_probe(run)
    run, _ = make_run("refused")
    path = run.inputs["baseline"] / "prompts.jsonl"
    write_prompts(path, prompts)
    with pytest.raises(UserError, match=r"line 1 of .* is not a prompt with its scores"):
        stage.run_probe(run)
    write_prompts(path, [])
    with pytest.raises(UserError, match=r"has no train prompts: run the stage baseline again"):
        stage.run_probe(run)

"""The stage baseline: against PyTorch on a small random model, on SmolLM2, and on what it must refuse."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import runs
from scipy.stats import binom

from saejax.errors import Interrupted, UserError
from saejax.models import source
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_model
from saejax.models.settings import ModelConfig
from saejax.results import to_json
from saejax.runner.registry import default_configs
from saejax.runner.workspace import Run
from saejax.stages.baseline.run import run_baseline
from saejax.tasks import baseline
from saejax.tasks.answer_tokens import MERGED
from saejax.tasks.behaviours import SCORES, Prompt, PromptScore, read_prompts
from saejax.tasks.draw import Drawn, make_prompts
from saejax.tasks.gate import gate, read_tested
from saejax.tasks.settings import DEMO_BEHAVIOURS, TaskConfig

pytestmark = pytest.mark.usefixtures("two_devices")
TASK = TaskConfig(train_prompts=15, test_prompts=6, gate=1.0)


def make_run(folder, path, task=TASK, lines=None, stopping=lambda: False):
    configs = default_configs() | ModelConfig(path=str(path)) | task
    return Run("baseline", "", folder, configs, {}, [].append if lines is None else lines.append, stopping)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a small random model: its model folder, its own folder, its results and what it said."""
    model = runs.save_model(tmp_path_factory.mktemp("model"))
    folder, lines = tmp_path_factory.mktemp("baseline"), []
    return model, folder, run_baseline(make_run(folder, model, lines=lines)), lines


def test_scores_are_those_of_pytorch(finished):
    import torch

    model, folder, _, _ = finished
    found = source.resolve(ModelConfig(path=str(model)))
    tokenizer, torch_model = source.load_tokenizer(found), source.load_torch_model(found, "float32")
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(lines) == len(DEMO_BEHAVIOURS) * 21
    for line in lines:
        length = len(tokenizer(line["text"])["input_ids"])
        answers = [tokenizer(line["text"] + line[key])["input_ids"][length:] for key in ("correct", "wrong")]
        correct, wrong = (ids[0] for ids in answers)
        for key, ids in zip(("correct", "wrong"), answers, strict=True):
            with torch.no_grad():
                logp = torch_model(torch.tensor([tokenizer(line["text"] + line[key])["input_ids"]])).logits[0]
            logp = logp.double().log_softmax(-1)[length - 1 : -1][range(len(ids)), ids].sum()
            np.testing.assert_allclose(line[f"{key}_log_likelihood"], float(logp), atol=5e-5)
        texts = (torch.tensor([tokenizer(line[key])["input_ids"]]) for key in ("text", "counterpart"))
        with torch.no_grad():
            logits, counterpart = (torch_model(ids_BxT).logits[0, -1] for ids_BxT in texts)
        wanted = float(logits[correct] - logits[wrong]), float(counterpart[wrong] - counterpart[correct])
        np.testing.assert_allclose([line["logit_diff"], line["counterpart_logit_diff"]], wanted, atol=2e-5)
        assert line["top1"] == (int(logits.argmax()) == correct)
    prompts = [p for name in DEMO_BEHAVIOURS for p in make_prompts(name, 15, 6, TASK.seed, tokenizer).prompts]
    assert read_prompts(folder / "prompts.jsonl") == prompts


def test_results_sum_up_the_scores(finished):
    _, folder, results, lines = finished
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert list(results.behaviours) == list(DEMO_BEHAVIOURS) and len(lines) == len(DEMO_BEHAVIOURS)
    json.dumps(to_json(results), allow_nan=False)
    for (name, result), line in zip(results.behaviours.items(), lines, strict=True):
        for split, n in (("train", 15), ("test", 6)):
            own = [row for row in rows if row["behaviour"] == name and row["split"] == split]
            diffs = np.array([row["logit_diff"] for row in own])
            expected = dict(
                accuracy=(diffs > 0).mean(),
                top1=np.mean([row["top1"] for row in own]),
                logit_diff=diffs.mean(),
                separation=diffs.mean() / diffs.std(),
                counterpart_accuracy=np.mean([row["counterpart_logit_diff"] > 0 for row in own]),
                answer_accuracy=np.mean([row["correct_log_likelihood"] > row["wrong_log_likelihood"] for row in own]),
                log_likelihood=np.mean([row["correct_log_likelihood"] for row in own]),
            )
            scores = dict(vars(result.splits[split]))
            assert scores.pop("n") == n == len(own)
            assert {key: score.mean for key, score in scores.items()} == pytest.approx(expected)
            assert all(score.low <= score.mean <= score.high for score in scores.values())
        # A random model has no behaviour, and the line says so.
        assert any(flag.startswith("separation") for flag in result.flags)
        assert line.startswith(f"{name}: on 6 test prompts accuracy") and result.flags[0] in line
        shown = [{key: row[key] for key in ("text", "correct", "wrong", "logit_diff")} for row in own[:3]]
        assert [vars(example) for example in result.examples] == shown


# Further behaviours are further prompts of the same functions.
@pytest.mark.parametrize(
    "names", [DEMO_BEHAVIOURS[:2], pytest.param(DEMO_BEHAVIOURS[2:], marks=pytest.mark.slow)], ids=["words", "numbers"]
)
def test_smollm2_has_the_behaviours(smollm2, monkeypatch, names):
    monkeypatch.setattr(baseline, "BATCH", 8)
    for name in names:
        prompts, _ = make_prompts(name, 2, 2, 42, smollm2.tokenizer)  # with their counterparts one full batch
        scores = baseline.score_prompts(smollm2, prompts)
        assert all(tuple(vars(score)) == SCORES for score in scores)
        assert np.mean([score.logit_diff > 0 for score in scores]) >= 0.8
        assert np.mean([score.counterpart_logit_diff > 0 for score in scores]) >= 0.8


def test_one_long_prompt_is_not_run_thirty_two_times(lm, monkeypatch):
    rows, last_logits = [], baseline._last_logits

    def watched(config, params, x_BxTxD, *more):
        rows.append(len(x_BxTxD))
        return last_logits(config, params, x_BxTxD, *more)

    texts = ["The cat runs" + " and so on" * count for count in (6, 5, 6)]
    prompts = [Prompt("long", "test", text, " the", " way") for text in texts]
    whole = baseline.score_prompts(lm, prompts)
    monkeypatch.setattr(baseline, "_last_logits", watched)
    monkeypatch.setattr(baseline, "_BATCH_TOKENS", 16)  # for a model of a small context
    few = baseline.score_prompts(lm, prompts)
    assert rows == [1, 1, 1]
    for score, wanted in zip(few, whole, strict=True):
        assert vars(score) == pytest.approx(vars(wanted), abs=1e-4)


def words(text, verbose=False, add_special_tokens=True):
    """A tokenizer of words."""
    return dict(input_ids=list(map(hash, text.split(" "))))


def summary_of(diffs, counterpart=1.0, **changes):
    drawn = make_prompts("agreement", 2, len(diffs), 42, words)
    scores = [PromptScore(diff, True, counterpart, -1.0, -2.0) for diff in (1.0, 2.0, *diffs)]
    return baseline.summarize(drawn, scores, dataclasses.replace(TASK, **changes))


def test_weak_behaviours_are_flagged_in_words():
    assert summary_of([2.0, 2.1, 1.9, 2.0, 1.0]).flags == ()
    assert summary_of([2.0, 2.1, 1.9, 2.0, -0.1]).flags == ()  # 0.80 is not below 0.80
    assert summary_of([2.0, 0.1, -0.1, 2.0]).flags == (
        "accuracy 0.750 on test prompts is below 0.800",
        "separation 0.998 on test prompts is below 1.000",
    )
    assert summary_of([0.0] * 4).test.accuracy.mean == 0  # a tie is not a correct answer
    ignores_content = summary_of([2.0, 2.1], counterpart=0.0)
    assert ignores_content.test.counterpart_accuracy.mean == 0
    drawn = make_prompts("agreement", 2, 2, 42, words).prompts
    one_answer = [dataclasses.replace(prompt, correct=" is", counterpart="") for prompt in drawn]
    scores = [PromptScore(2.0 + 0.1 * row, True, None, -1.0, -2.0) for row in range(4)]
    (flag,) = baseline.summarize(Drawn(one_answer, {}), scores, TASK).flags
    assert flag == "the right answer is ' is' in every prompt, and no prompt has a counterpart"
    told = [f"counterpart accuracy 0.000 on {split} prompts is below 0.800" for split in ("train", "test")]
    assert list(ignores_content.flags) == told
    json.dumps(to_json(summary_of([3.0] * 4)), allow_nan=False)


def test_the_gate_is_an_exact_binomial_test():
    p, why = gate(49, 80, 0.05)
    assert p == pytest.approx(sum(math.comb(80, k) for k in range(49, 81)) / 2**80) and p < 0.05 and why == ""
    p, why = gate(47, 80, 0.05)
    assert p > 0.05 and "right on 47 of 80 train prompts (59 %)" in why and "p = 0.073, above --task.gate=0.05" in why
    assert gate(0, 80, 1.0)[1] == ""
    # Of models that guess, and of those that are right on two of three, by the binomial distribution.
    passed = [sum(binom.pmf(n, 80, p) for n in range(81) if not gate(n, 80, 0.05)[1]) for p in (0.5, 2 / 3)]
    print(f"a behaviour passes the gate: {100 * passed[0]:.1f} % that guess, {100 * passed[1]:.1f} % that are right")
    assert passed[0] <= 0.08 and passed[1] >= 0.8
    assert summary_of([1.0, 2.0], gate=0.05).left_out.startswith("the model does not have it: right on 2 of 2")
    assert summary_of([1.0, 2.0], gate=0.05).p_value == 0.25 and summary_of([1.0, 2.0]).left_out is None


def test_behaviours_that_the_model_does_not_have_are_left_out(tmp_path, finished, monkeypatch):
    def score(model, prompts):  # capital alone
        return [PromptScore(1.0 if p.behaviour == "capital" else -1.0, True, 1.0, -1.0, -2.0) for p in prompts]

    monkeypatch.setattr("saejax.stages.baseline.run.score_prompts", score)
    task, lines = dataclasses.replace(TASK, behaviours=("agreement", "capital"), gate=0.05), []
    results = run_baseline(make_run(tmp_path, finished[0], task, lines))
    assert list(results.left_out) == ["agreement"] and list(results.behaviours) == ["agreement", "capital"]
    assert "left out of the causal tests: the model does not have it: right on 0 of 15" in lines[0]
    (tmp_path / "none").mkdir()
    task = dataclasses.replace(task, behaviours=("agreement",))
    run_baseline(make_run(tmp_path / "none", finished[0], task, lines))
    assert lines[-1].startswith("no behaviour is left to test: agreement: the model does not have it")
    found = read_tested(tmp_path)
    (tmp_path / "weak").mkdir()
    run_baseline(make_run(tmp_path / "weak", finished[0], dataclasses.replace(task, gate=1.0), lines))
    mark = read_tested(tmp_path / "weak").mark("agreement")
    assert mark.startswith(" (weak: accuracy 0.000 on train prompts is below 0.800; ") and found.mark("capital") == ""
    assert list(found.prompts) == ["capital"] and len(found.prompts["capital"]) == 21
    assert found.left_out == dict(results.left_out)
    assert read_tested(tmp_path, ["capital"]).left_out == {}
    with pytest.raises(UserError, match="no behaviour is left to test: agreement: the model does not have it"):
        read_tested(tmp_path, ["agreement"])
    with pytest.raises(UserError, match=r"unknown behaviour \(--x\) 'rhyme': expected one of agreement, capital"):
        read_tested(tmp_path, ["rhyme"], "--x")
    (tmp_path / "gate.json").unlink()  # as in a folder of before
    assert list(read_tested(tmp_path).prompts) == ["agreement", "capital"]


def test_a_tokenizer_without_the_answers_is_refused_unless_others_are_left(finished, tmp_path, monkeypatch):
    joined = lambda tokenizer, prompt: MERGED if prompt.behaviour == "capital" else ""  # noqa: E731
    monkeypatch.setattr("saejax.tasks.draw.fault", joined)
    task, lines = dataclasses.replace(TASK, behaviours=("capital",)), []
    with pytest.raises(UserError, match="no behaviour is left to test: capital: 0 of 15 train .* is joined with"):
        run_baseline(make_run(tmp_path, finished[0], task))
    assert not list(tmp_path.iterdir())
    task = dataclasses.replace(task, behaviours=("capital", "agreement"))
    results = run_baseline(make_run(tmp_path, finished[0], task, lines))
    assert list(results.behaviours) == ["agreement"] and list(results.left_out) == ["capital"]
    assert any(line.startswith("capital: not measured: 0 of 15 train prompts could be made") for line in lines)
    assert list(read_tested(tmp_path).prompts) == ["agreement"]


def test_a_prompt_longer_than_the_context_is_refused_and_a_stop_leaves_nothing(finished, tmp_path):
    model = runs.save_model(tmp_path / "model", max_position_embeddings=20)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="has 2[0-9] tokens, more than the model's context of 20"):
        run_baseline(make_run(tmp_path / "run", model, dataclasses.replace(TASK, behaviours=("addition",))))
    with pytest.raises(Interrupted):
        run_baseline(make_run(tmp_path / "run", finished[0], stopping=lambda: True))
    assert not list((tmp_path / "run").iterdir())


def test_logits_that_are_not_finite_are_refused(smollm2):
    params = smollm2.params | dict(final_norm_D=jnp.full_like(smollm2.params["final_norm_D"], jnp.nan))
    broken = LanguageModel(smollm2.config, params, smollm2.tokenizer, smollm2.source, smollm2.mesh)
    prompts, _ = make_prompts("capital", 2, 2, 42, smollm2.tokenizer)
    with pytest.raises(UserError, match=f"not finite on '{prompts[0].text}'"):
        baseline.score_prompts(broken, prompts)


def test_batches_have_one_shape(finished, one_device):
    model = load_model(str(finished[0]), mesh=one_device)
    prompts, _ = make_prompts("capital", 20, 20, 42, model.tokenizer)
    alone = baseline.score_prompts(model, prompts[20:22])  # one is of the longest template
    before = baseline._last_logits._cache_size()
    together = baseline.score_prompts(model, prompts)  # 80 texts: two full batches and a half one
    assert baseline._last_logits._cache_size() == before
    assert len(together) == 40
    np.testing.assert_allclose([s.logit_diff for s in together[20:22]], [s.logit_diff for s in alone], atol=1e-5)


def test_own_behaviours_need_no_counterparts(finished, tmp_path):
    texts, splits = ("Two", "Ten", "Six", "All"), ("train", "train", "test", "test")
    line = dict(behaviour="plural", correct=" cats", wrong=" dog")
    lines = [line | dict(text=text, split=split) for text, split in zip(texts, splits, strict=True)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = dataclasses.replace(TASK, behaviours=("capital",), prompts=str(tmp_path / "own.jsonl"))
    results = run_baseline(make_run(tmp_path, finished[0], task)).behaviours
    assert list(results) == ["capital", "plural"]
    assert results["plural"].test.n == 2 and results["plural"].test.counterpart_accuracy is None
    assert results["capital"].test.counterpart_accuracy.mean >= 0
    assert tuple(p.text for p in read_prompts(tmp_path / "prompts.jsonl") if p.behaviour == "plural") == texts

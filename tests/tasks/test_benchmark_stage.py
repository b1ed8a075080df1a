"""The stage benchmark: rows and figures for every way of scoring, what it resumes, and what it must refuse."""

import dataclasses
import json
import types

import numpy as np
import pytest
import runs
import settings_read
from benchmark_rows import GSM8K, write_all

from saejax import load_model
from saejax.errors import Interrupted, UserError
from saejax.models.language_model import LanguageModel
from saejax.models.settings import ModelConfig
from saejax.runner import command, pipeline, workplan
from saejax.runner.registry import default_configs
from saejax.runner.workspace import Run
from saejax.stages.benchmark.run import line, run_benchmark
from saejax.tasks import benchmark_scores
from saejax.tasks.answers import Verdict
from saejax.tasks.benchmark_scores import score_items, summarize
from saejax.tasks.benchmarks import read_items
from saejax.tasks.likelihood import encode_pair, loglikelihoods
from saejax.tasks.results import UnparsedExample
from saejax.tasks.settings import BENCHMARKS, TaskConfig


@pytest.fixture(scope="module")
def lm(inputs, one_device):
    return load_model(str(inputs[0]), mesh=one_device)


@pytest.fixture(scope="module")
def task(folder):
    return TaskConfig(benchmarks=BENCHMARKS, path=str(folder), examples=6, shots=0, max_new_tokens=8, batch=4)


@pytest.fixture
def writes(monkeypatch):
    """A model that writes the given texts, one after the other; what it was asked is recorded."""
    asked, texts = [], []

    def generate(self, tokens, max_new_tokens, *, stop, edits):
        asked.append((tokens, max_new_tokens, stop, edits))
        return [types.SimpleNamespace(text=texts.pop(0), finished="eos", ids=()) for _ in tokens.lengths_B]

    monkeypatch.setattr(LanguageModel, "generate", generate)
    return asked, texts


# Scoring


def test_generated_numbers_are_judged(lm, task, writes):
    asked, texts = writes
    items = read_items("gsm8k", task)
    answers = [item.answer for item in items]
    texts += [f"so\n#### {answers[0]}", f"so {answers[1]}.", "#### 1000000", "who knows", f"#### {answers[4]}, 0", ""]
    rows = score_items(lm, "gsm8k", items, task)
    assert [row.strict.correct for row in rows] == [True, False, False, False, True, False]
    assert [row.flexible.correct for row in rows] == [True, True, False, False, False, False]
    assert [row.strict.answer for row in rows] == [answers[0], None, "1000000", None, f"{answers[4]},", None]
    assert rows[1].prompt == f"Question: {items[1].question}\nAnswer:" and rows[1].reference == answers[1]
    assert [len(tokens.lengths_B) for tokens, *_ in asked] == [4, 2]
    assert asked[0][1:] == (8, ("Question:", "</s>", "<|im_end|>"), ())
    first = asked[0][0]
    assert first.ids_BxT[0, : first.lengths_B[0]].tolist() == lm.tokenizer(rows[0].prompt)["input_ids"]

    figures = summarize("gsm8k", rows, task)
    assert figures.score == "generate" and figures.n == 6 and figures.cut == 0
    assert figures.unparsed == dict(strict=3, flexible=2)
    assert figures.unparsed_examples[1] == UnparsedExample(id=items[3].id, output="who knows")
    accuracy = {rule: value.mean for rule, value in figures.accuracy.items()}
    assert accuracy == pytest.approx(dict(strict=2 / 6, flexible=2 / 6))
    assert all(0 <= value.low < value.mean < value.high <= 1 for value in figures.accuracy.values())
    said = line(figures)
    assert "6 items: accuracy strict 33.3 % [" in said and "no answer found: strict 3, flexible 2" in said


def test_generated_formulas_are_judged(lm, task, writes):
    items = read_items("math", task)
    writes[1].extend([rf"It is $\boxed{{{item.answer}.0}}$" for item in items[:4]] + [f"${items[4].answer}$", "no"])
    rows = score_items(lm, "math", items, task)
    assert [row.strict.correct for row in rows] == [True] * 4 + [False] * 2
    assert [row.flexible.correct for row in rows] == [True] * 5 + [False]
    assert summarize("math", rows, task).unparsed == dict(strict=2, flexible=1)


def test_choices_are_judged_by_likelihood(lm, task):
    every = dataclasses.replace(task, examples=15)
    items = read_items("logic", every)
    rows = score_items(lm, "logic", items, every)
    for item, row in zip(items, rows, strict=True):
        pairs = [encode_pair(lm.tokenizer, row.prompt, f" {choice}") for choice in item.choices]
        totals = [one.total for one in loglikelihoods(lm, *zip(*pairs))]
        np.testing.assert_allclose(row.log_likelihoods, totals, rtol=1e-5)
        lengths = [len(choice) for choice in item.choices]
        best = dict(raw=np.argmax(totals), normalised=np.argmax(np.array(totals) / lengths))
        for rule, index in best.items():
            assert getattr(row, rule) == Verdict(item.choices[index], item.choices[index] == item.answer)
    figures = summarize("logic", rows, every)
    assert figures.chance == pytest.approx(np.mean([1 / len(item.choices) for item in items]))
    assert sum(part.n for part in figures.tasks.values()) == figures.n == 15
    for rule in ("raw", "normalised"):
        correct = [getattr(row, rule).correct for row in rows if row.task == "web_of_lies"]
        assert getattr(figures.tasks["web_of_lies"], rule).mean == np.mean(correct)
    assert line(figures).endswith("; chance 36.7 %")


def test_length_normalisation_can_change_the_choice(lm, task, monkeypatch):
    found = [benchmark_scores.Likelihood(total, 1, 0) for total in (-4.5, -4.0)]
    monkeypatch.setattr(benchmark_scores, "loglikelihoods", lambda *args: found)
    items = [item for item in read_items("logic", dataclasses.replace(task, examples=15)) if item.choices[0] == "True"]
    (row,) = score_items(lm, "logic", items[:1], task)
    # "True" has 4 characters, "False" 5: -4.5/4 is below -4.0/5.
    assert row.raw.answer == row.normalised.answer == "False"
    found[:] = [benchmark_scores.Likelihood(total, 1, 0) for total in (-4.0, -4.5)]
    (row,) = score_items(lm, "logic", items[:1], task)
    assert row.raw.answer == "True" and row.normalised.answer == "False"


def test_solutions_are_scored_by_likelihood(lm, task):
    weak = dataclasses.replace(task, score="likelihood")
    items = read_items("gsm8k", weak)
    rows = score_items(lm, "gsm8k", items, weak)
    for item, row in zip(items, rows, strict=True):
        (one,) = loglikelihoods(lm, *zip(encode_pair(lm.tokenizer, row.prompt, f" {item.solution}")))
        assert row.solution == item.solution and row.tokens == one.tokens
        assert row.log_likelihood == pytest.approx(one.total, rel=1e-5)
        assert row.log_likelihood_per_token == row.log_likelihood / row.tokens
        assert row.token_accuracy == one.correct_tokens / one.tokens
    figures = summarize("gsm8k", rows, weak)
    mean = np.mean([row.log_likelihood_per_token for row in rows])
    interval = figures.log_likelihood_per_token
    assert interval.mean == pytest.approx(mean) and interval.low < mean < interval.high < 0
    assert 0 <= figures.token_accuracy.mean <= 1 and "nats" in line(figures)
    assert summarize("logic", score_items(lm, "logic", read_items("logic", weak), weak), weak).n == 6


def test_edits_reach_the_model_that_writes(lm, task, writes):
    edit, items = object(), read_items("gsm8k", task)
    writes[1].extend(["7"] * 6)
    score_items(lm, "gsm8k", items, task, edits=[edit])
    assert all(call[3] == (edit,) for call in writes[0])


def test_what_does_not_fit_is_refused(lm, task):
    for name, score in (("logic", "generate"), ("math", "choice")):
        with pytest.raises(UserError, match=f"score={score} does not fit {name}: expected one of auto, "):
            score_items(lm, name, [], dataclasses.replace(task, score=score))
    items = read_items("gsm8k", task)
    too_long = r"gsm8k, item test:\d+: its prompt has \d+ tokens, which with \d+ of .* of 256: lower --task.shots"
    with pytest.raises(UserError, match=rf"{too_long} .now 1. or --task.max_new_tokens"):
        score_items(lm, "gsm8k", items, dataclasses.replace(task, shots=1, max_new_tokens=200))
    with pytest.raises(UserError, match=rf"{too_long} .now 5.$"):
        score_items(lm, "gsm8k", items, dataclasses.replace(task, score="likelihood", shots=5))


# The stage


def make_run(folder, name, model, task, lines=None, stopping=lambda: False):
    configs = default_configs() | ModelConfig(path=str(model)) | task
    return Run("benchmark", name, folder, configs, {}, [].append if lines is None else lines.append, stopping)


def rows_of(folder):
    return [json.loads(text) for text in (folder / "items.jsonl").read_text().split("\n") if text]


def test_an_interrupted_benchmark_goes_on(inputs, task, tmp_path, writes):
    _, texts = writes
    texts += ["#### 1\u2028x", "2", "3", "4"]  # a line separator of Unicode is no end of a row
    calls = iter([False, True])
    with pytest.raises(Interrupted, match="stopped after 4 of 6 items, which are kept"):
        run_benchmark(make_run(tmp_path, "gsm8k", inputs[0], task, stopping=lambda: next(calls)))
    texts += ["5", "6"]
    lines = []
    results = run_benchmark(make_run(tmp_path, "gsm8k", inputs[0], task, lines))
    assert lines[0] == "4 of 6 items were done before" and results.n == 6 and not texts
    assert [row["output"] for row in rows_of(tmp_path)] == ["#### 1\u2028x", "2", "3", "4", "5", "6"]


def test_the_binary_writes_a_unit_per_benchmark(inputs, folder, tmp_path):
    flags = dict(benchmarks="logic,gsm8k", path=folder, examples=3, shots=0, max_new_tokens=8, batch=2, behaviours="")
    changes = {f"task__{key}": value for key, value in flags.items()}
    assert command.run(["baseline", "benchmark"], "", ["program", *runs.small_flags(*inputs, tmp_path, **changes)]) == 0
    assert json.loads((tmp_path / "baseline" / "done.json").read_text())["results"] == {"behaviours": {}}
    for name in ("logic", "gsm8k"):
        summary = json.loads((tmp_path / "benchmark" / name / "done.json").read_text())
        results = summary["results"]
        assert results["n"] == 3 and list(summary["files"]) == ["items.jsonl"]
        assert summary["config"]["task"]["examples"] == 3 and summary["seeds"] == {"task": 42}
    rows = rows_of(tmp_path / "benchmark" / "gsm8k")
    items = read_items("gsm8k", TaskConfig(path=str(folder), examples=3))
    assert [row["id"] for row in rows] == [item.id for item in items]
    # A random model writes anything, and hardly "#### ".
    assert all(row["output"] and row["finished"] in ("length", "eos", "stop") for row in rows)
    strict = results["accuracy"]["strict"]  # Wilson: none of three may still be half
    assert (strict["mean"], strict["low"]) == (0.0, 0.0) and strict["high"] > 0.4
    assert results["unparsed"]["strict"] == 3 and results["origin"].endswith("gsm8k/test.jsonl")
    assert settings_read.never_read("benchmark") <= set()


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--task.path=", "the commit of the data set openai/gsm8k (revision main) could not be found"),
        ("--task.shots=99", "--task.shots=99: gsm8k has 8 worked examples; expected 0 to 8"),
        ("--task.score=guess", "--task.score is 'guess': expected one of auto, generate, choice, likelihood"),
    ],
)
def test_bad_input_is_one_line(inputs, folder, tmp_path, capsys, flag, said):
    flags = runs.small_flags(*inputs, tmp_path / "run", task__benchmarks="gsm8k", task__path=folder, task__shots=0)
    capsys.readouterr()
    assert command.run(["benchmark"], "", ["program", *flags, "--task.examples=3", flag]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0], error
    assert not (tmp_path / "run" / "benchmark" / "gsm8k" / "done.json").exists()


def plan(folder, **changes):
    """The fingerprints of all units."""
    configs = default_configs() | TaskConfig(**dict(path=str(folder)) | changes)
    made = workplan.Workplan(configs)
    return {unit: made.fingerprint(unit) for stage in pipeline.all_stages().values() for unit in stage.units(configs)}


def test_benchmarks_and_what_they_do_not_touch(folder, tmp_path):
    plain, both = plan(folder), plan(folder, benchmarks=("gsm8k", "logic"))
    assert set(both) - set(plain) == {"benchmark/gsm8k", "benchmark/logic"}
    changed = {unit for unit in plain if both[unit] != plain[unit]}
    assert changed == {"preflight", "report"}, "preflight says what will run: nothing is captured or trained"
    units = {"benchmark/gsm8k", "benchmark/logic", "report"}
    for change, again in [
        # Preflight compiles the program that answers, whose size depends on them.
        (dict(shots=1), {"preflight", *units}),
        (dict(max_new_tokens=9), {"preflight", *units}),
        (dict(batch=3), {"preflight"}),
        (dict(test_prompts=5), {"preflight", "baseline", "ablate/topk", "report"}),
        (dict(path=str(write_all(tmp_path / "copy"))), set()),
    ]:
        replanned = plan(folder, benchmarks=("gsm8k", "logic"), **change)
        assert {unit for unit in both if both[unit] != replanned[unit]} == again, change
    with (tmp_path / "copy" / "gsm8k" / "test.jsonl").open("a") as file:
        file.write(json.dumps(GSM8K[0]) + "\n")
    replanned = plan(tmp_path / "copy", benchmarks=("gsm8k", "logic"))
    assert {unit for unit in both if both[unit] != replanned[unit]} == {"benchmark/gsm8k", "report"}

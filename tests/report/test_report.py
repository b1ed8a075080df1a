"""The report over a made-up workspace: complete in itself, says what was found, and says no when it is no."""

import dataclasses
import itertools
import re

import pytest
from absl import flags
from made_up_workspace import copy_inputs, made_up_contexts, make_run, make_workspace
from report_page import Report

from saejax.errors import Interrupted, UserError
from saejax.files import read_json, write_json
from saejax.page import style
from saejax.runner import registry
from saejax.runner.flags import define_flags, from_flags
from saejax.runner.results import load_results
from saejax.runner.workspace import SUMMARY
from saejax.stages.report import run as stage
from saejax.tasks.settings import TaskConfig


def test_the_page_opens_with_pictures_and_the_table(report):
    html = report.html.partition("<main>")[2]
    pieces = ("<figure", "<table", "1. Effect, logits", "Simpler bases", "<details>")
    order = [html.index(piece) for piece in pieces]
    assert order == sorted(order)
    assert html[: order[0]].count("<p") <= 1, "a sentence before the first picture"
    assert html[: order[1]].count("<figure") == 4, "a picture for each behaviour"


def test_both_say_the_answers_figures_scores_and_settings(report):
    assert report.results.specific == dict(agreement="yes", capital="yes", greater_than="no", addition="no")
    tested = load_results(report.root / "inputs/ablate/topk").verdict.dictionaries["tested"]
    for text in report.texts:
        for words in (
            "more than MLP neurons, principal components",
            "Ablating the 20 top features lowers the logit difference by 4.3",
            "placebo sets, chosen for other answers, cost more than nearly all random lists",
            "features that change the site as much cost",
            "training mattered",
            "Accuracy 0.70 on test prompts is below 0.80; separation −0.1 is below 1.00.",  # the flags
            "Weak, so that the answers prove little: accuracy 0.70 on test prompts is below 0.80; separation −0.1",
            "Two-digit addition (weak)",
            "after worked examples (weak). Of the",  # the lead
            *("Answers: Two-digit addition (weak)", "Features: Two-digit addition (weak)"),
            "−0.10 [−∞, 1.20]",
            "p-values are corrected by Holm's method over the behaviours within each question.",  # the rule
            "Of all 900 live features, each ablated alone, 40 have a significant effect",
            "The effect has a rank correlation of 0.91 with attribution",
            *("0.860", "0.991", "58.7", "0.931", "0.988", "0.31"),  # at the end: cosine, KL recovered, neighbours
            "1,017 captured tokens at position 0 and 41 beyond it, which is 0.16 %",
            "here 1,778,",
            *("jax==0.10.2", "12.3", "1 × cpu", "task 42, train 123"),  # the settings
        ):
            assert words in text
        assert not re.search(r"[ \[]-\d", text)  # true minus signs
        numbers = tested["agreement"].random.numbers
        assert f", × {numbers['top'] / numbers['high']:.1f}; p " in text and numbers["top"] > numbers["high"] > 0
        for result in (tested["agreement"], tested["capital"]):
            assert result.fooled > 40, "placebo sets with half of the effect"
            assert f"{result.fooled} of {result.placebo_sets}" in text


@pytest.mark.parametrize("answers", [0, 1, 5])
def test_a_report_stops_between_its_parts(report, tmp_path, monkeypatch, answers):
    asked = itertools.count()
    run = dataclasses.replace(
        make_run(tmp_path, copy_inputs(report.root, tmp_path)), stopping=lambda: next(asked) >= answers
    )
    monkeypatch.setattr(stage, "contexts", lambda run, name, features, count: made_up_contexts(features, count))
    monkeypatch.setattr(style, "save", lambda *figure: '<svg width="1pt" viewBox="0 0 1 1"></svg>')
    with pytest.raises(Interrupted, match="report: stopped; run the same command to write it"):
        stage.run_report(run)
    assert next(asked) == answers + 1 and not (run.folder / "index.html").exists()


def test_a_report_without_a_specific_behaviour_says_so_first_and_names_those_without_top_features(report, tmp_path):
    inputs = copy_inputs(report.root, tmp_path)
    summary = read_json(inputs["ablate/topk"] / SUMMARY)
    for result in summary["results"]["verdict"]["dictionaries"]["tested"].values():
        result["placebo"]["answer"] = "no"
    summary["results"]["verdict"]["untested"] = {"two_hop": "no feature of the dictionary fires"}
    summary["results"]["site"] = "resid_post.5+resid_post.15"
    write_json(inputs["ablate/topk"] / SUMMARY, summary)
    for text in Report(tmp_path, inputs).texts:
        place = text.index("For no behaviour are the top features shown to be specific to its answer.")
        assert place < text.index("The rule in full")
        assert "Capital of a city's state or country is not testable: no feature of the dictionary fires." in text
        sites = [f"the residual stream after layer {layer} (resid_post.{layer})" for layer in (5, 15)]
        assert f"only {' and '.join(sites)} were tested" in text and "Few sites" in text and "One site" not in text


def test_one_top_feature_is_told_in_the_singular(report, tmp_path):
    inputs = copy_inputs(report.root, tmp_path)
    summary = read_json(inputs["ablate/topk"] / SUMMARY)
    summary["results"]["k"] = 1
    for name, top in summary["results"]["top"].items():
        summary["results"]["top"][name] = top[:1]
    write_json(inputs["ablate/topk"] / SUMMARY, summary)
    for text in Report(tmp_path, inputs).texts:
        assert "the one with the largest attribution was chosen on train prompts and ablated on 20 test" in text
        assert "Ablated alone, 1 of 1 feature lowers the logit difference" in text


def test_the_settings_can_be_used_as_a_flag_file(report, tmp_path):
    def read(*arguments):
        values = flags.FlagValues()
        define_flags(registry.all_groups(), values)
        values(["program", *arguments])
        return from_flags(registry.all_groups(), values)

    block = re.search(r"```\n(--model.*?)\n```", report.markdown, re.DOTALL).group(1)
    (tmp_path / "run.flags").write_text(block.replace("--task.train_prompts=80", "--task.train_prompts=81"))
    configs, defaults = read(f"--flagfile={tmp_path / 'run.flags'}"), read()
    assert configs[TaskConfig].train_prompts == 81
    assert list(configs | defaults[TaskConfig]) == list(defaults)


def test_a_run_with_stacks_lists_their_members_and_draws_the_frontier(tmp_path):
    report = Report(tmp_path, make_workspace(tmp_path, members=("k16", "k32", "k64")))
    assert "frontier" in report.results.figures
    for text in report.texts:
        for words in (
            "topk (3 of them), which keeps the k largest activations of each token",
            "The causal tests use topk/k64.",
            "with one dictionary (topk/k64)",
            "The members of topk",
            "The members of standard",
            "103.7",  # L0 of topk/k64
            "line joins the dictionaries of one kind and site",
        ):
            assert words in text
        assert text.count("k16") == 2
    assert "| Measure | topk/k64 |\n" in report.markdown
    described = {attrs["aria-label"] for tag, attrs in report.page.tags if tag == "svg"}
    assert any("topk: explained variance 0.860 to 0.910 at L0 32 to 104." in text for text in described)


def test_features_have_numbers_contexts_and_where_they_are_missing_a_reason(report):
    results = report.results
    assert results.contexts[7] == 0 and set(results.contexts.values()) == {0, 5}
    for text in report.texts:
        assert text.count("It fires nowhere in the captured text, so there is no context to show.") == 4
        assert text.count("It fires on no held-out token.") == 4
        assert all(f"Feature {feature}" in text for feature in results.contexts)
        assert "also among the top features of: Subject-verb agreement, Capital of a country" in text


def test_one_dictionary_and_long_lists(tmp_path):
    inputs = make_workspace(tmp_path, kinds=("topk",), top=60, sets=5)
    report = Report(tmp_path, inputs, title="Is <this>\n& that so?")
    text = report.page.text
    for words in ("Is <this>\n& that so?", "not testable (5 of 79 sets)", "of 60 features lower the logit difference"):
        assert words in text
    # What no line of a flag file can hold stands on the command line.
    assert "--flagfile=run.flags '--report.title=Is <this>\n& that so?'" in text and text.count("--report.title=") == 1
    assert "standard" not in text.replace("standard deviation", "").split("How to reproduce")[0]


@pytest.mark.parametrize(
    ("units", "title"), [(("evaluate", "train"), "The dictionaries of smollm2"), (("capture",), "What this run found")]
)
def test_a_report_without_behaviours_asks_nothing_about_them(report, tmp_path, units, title):
    inputs = {unit: report.root / "inputs" / unit for stage in units for unit in (f"{stage}/topk", stage)}
    inputs = {unit: folder for unit, folder in inputs.items() if (folder / SUMMARY).exists()}
    assert Report(tmp_path, inputs).markdown.startswith(f"# {title}\n")


@pytest.mark.parametrize(
    ("unit", "name", "content"),
    [
        ("baseline", SUMMARY, None),
        ("ablate/topk", SUMMARY, "{"),
        ("ablate/topk", "edits.json", "{"),
        ("train/topk", "metrics.jsonl", None),
        ("train/standard", "metrics.jsonl", '{"tokens": 1}\n'),
        ("train/standard", "metrics.jsonl", "not json\n"),
        ("evaluate/topk", "firing_rate.npy", None),
        ("evaluate/topk", "mean_activation.npy", "x"),
    ],
)
def test_a_missing_or_damaged_input_is_named(report, tmp_path, unit, name, content):
    inputs = copy_inputs(report.root, tmp_path)
    (inputs[unit] / name).unlink()
    if content is not None:
        (inputs[unit] / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(str(inputs[unit] / name))):
        Report(tmp_path, inputs)
    assert not (tmp_path / "report" / "index.html").exists()

"""The report over a made-up workspace: complete in itself, says what was found, and says no when it is no."""

import dataclasses
import re

import numpy as np
import pytest
from made_up_workspace import make_run, make_workspace
from report_page import Page

from saejax import registry
from saejax.config import define_flags, from_flags
from saejax.errors import UserError
from saejax.files import read_json, write_json
from saejax.report.run import run_report, token_text
from saejax.results import load_results, to_json
from saejax.settings import TaskConfig
from saejax.workspace import SUMMARY

pytestmark = pytest.mark.usefixtures("contexts_are_made_up")


def both(made):
    """Visible text of the page and of the Markdown, with plain spaces and without escapes."""
    folder, _, page = made
    markdown = (folder / "report.md").read_text(encoding="utf-8").replace("&amp;", "&")
    return [" ".join(re.sub(r"\\(.)", r"\1", text).replace("**", "").split()) for text in (page.text, markdown)]


def test_both_say_the_verdicts_and_their_figures(made):
    grades = dict(agreement="beyond_bases", capital="beyond_matched", greater_than="none", addition="none")
    assert made[1].grades == grades
    for text in both(made):
        assert "The top features cost Subject-verb agreement more than other bases at equal dose, but not these" in text
        assert "Not shown that removing the top features costs Greater-than on years, Two-digit addition." in text
        assert "equal dose: Subject-verb agreement: principal components; Capital of a country: princ" in text
        assert "difference of means, Capital of a country: its train prompts have one answer" in text
        assert "55 [35, 75]" in text and "4.30 [3.60, 5.00]" in text  # the top features, with intervals
        assert text.count("The interval of the accuracy lost reaches zero") == 1 and "10 [0, 25]" in text  # capital
        assert "0.00 in every draw" in text  # a control without spread
        assert "Without the 20 features accuracy goes from 95 % to 40 %" in text
        assert "Accuracy 0.70 on test prompts is below 0.80; separation −0.1 is below 1.00." in text  # the flags
        assert "−0.10 [−∞, 1.20]" in text
        assert not re.search(r"[ \[]-\d", text)  # true minus signs
        assert "Removing the top 20 features together harms a behaviour if" in text  # the rule
        assert text.count("Not shown that removing these features costs the behaviour.") == 2
        assert "Beyond other bases at equal dose: not known" in text and "less is lost along those of: MLP neu" in text


def test_all_features_are_shown_where_they_were_measured(made):
    for text in both(made):
        assert "Each of the 900 features that fire on the test prompts was removed by itself." in text
        assert "40 effects are discoveries" in text and "independent or positively dependent; 40 by maxT" in text
        assert "Correlation of estimates with the effect: gradient 0.99 (of ranks 0." in text and "; relp 0.99" in text
    assert "every_feature_agreement" in made[1].figures and "every_feature_capital" not in made[1].figures


def test_sets_of_features_are_shown_where_they_were_measured(made):
    for text in both(made):
        assert "not equivalent" in text and "Sets grown on train prompts" in text
        assert "has a rank correlation of " in text and "two halves of the prompts have one of 0.61" in text
    assert made[1].figures.count("cumulative") == 1


def test_the_control_stands_beside_the_top_features(made):
    ablate = read_json(made[0].parent / "inputs/ablate/topk" / SUMMARY)["results"]
    draws = np.array(ablate["behaviours"]["capital"]["controls"]["logit_diff_drop"])
    low, high = np.percentile(draws, [2.5, 97.5])
    shown = f"{draws.mean():.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
    for text in both(made):
        assert shown in text


def test_both_say_scores_sinks_and_settings(made):
    for text in both(made):
        assert "0.860" in text and "0.991" in text and "58.7" in text
        assert "1,017 captured tokens at position 0 and 41 beyond it, which is 0.16 %" in text
        assert "here 1,778," in text
        assert "jax==0.10.2" in text
        assert "12.3" in text and "1 × cpu" in text and "task 42, train 123" in text
        assert "0.931" in text and "0.988" in text and "0.31" in text  # cosine, KL recovered, neighbours


def test_the_settings_can_be_used_as_a_flag_file(made, tmp_path):
    from absl import flags

    values, plain = flags.FlagValues(), flags.FlagValues()
    for each in (values, plain):
        define_flags(registry.GROUPS, each)
    block = re.search(r"```\n(--model.*?)\n```", (made[0] / "report.md").read_text(), re.DOTALL).group(1)
    (tmp_path / "run.flags").write_text(block.replace("--task.train_prompts=80", "--task.train_prompts=81"))
    values(["program", f"--flagfile={tmp_path / 'run.flags'}"])
    plain(["program"])
    configs, defaults = from_flags(registry.GROUPS, values), from_flags(registry.GROUPS, plain)
    assert configs[TaskConfig].train_prompts == 81
    assert list(configs | defaults[TaskConfig]) == list(defaults)


def test_a_run_with_stacks_lists_their_members_and_draws_the_frontier(tmp_path):
    inputs = make_workspace(tmp_path, members=("k16", "k32", "k64"))
    run = make_run(tmp_path, inputs)
    results = run_report(run)
    assert "frontier" in results.figures
    page = Page((run.folder / "index.html").read_text(encoding="utf-8"))
    both_texts = [page.text, (run.folder / "report.md").read_text(encoding="utf-8")]
    for text in (" ".join(text.split()) for text in both_texts):
        assert "topk (3 of them), which keeps the k largest activations of each token" in text
        assert "The causal tests use topk/k64." in text and "with one dictionary (topk/k64)" in text
        assert "The members of topk" in text and "The members of standard" in text
        assert text.count("k16") == 2 and "103.7" in text  # L0 of topk/k64
        assert "line joins the dictionaries of one kind and site" in text
    header = re.search(r"\| Measure \|.*", both_texts[1]).group()
    assert header == "| Measure | topk/k64 |"
    described = {attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"}
    assert any("topk: explained variance 0.860 to 0.910 at L0 32 to 104." in text for text in described)


def test_features_have_numbers_contexts_and_where_they_are_missing_a_reason(made):
    _, results, _ = made
    assert results.contexts[7] == 0 and set(results.contexts.values()) == {0, 5}
    for text in both(made):
        assert text.count("It fires nowhere in the captured text, so there is no context to show.") == 4
        assert text.count("It fires on no held-out token.") == 4
        for feature in results.contexts:
            assert f"Feature {feature}" in text
        assert "also among the top features of: Subject-verb agreement, Capital of a country" in text


def test_all_no_one_dictionary_long_lists_and_an_empty_one(tmp_path):
    inputs = make_workspace(tmp_path, kinds=("topk",), top=60, draws=5)
    summary = read_json(inputs["ablate/topk"] / SUMMARY)
    results = summary["results"]["behaviours"]
    for result in results.values():
        result["grades"] |= dict(harms=dict(holds=False, reason="too little"), highest="none")
    nothing = results["addition"]
    nothing["top"], nothing["joint"]["n"] = [], 0
    nothing["controls"] |= dict(
        match=dict(firing_rate_ratio=None, activation_ratio=None, norm_ratio=None), logit_diff_drop=[0.0] * 5
    )
    write_json(inputs["ablate/topk"] / SUMMARY, summary)
    run = make_run(tmp_path, inputs, title="Is <this> & that so?", features=1)
    assert run_report(run).figures.count("features_addition") == 0
    text = Page((run.folder / "index.html").read_text()).text
    assert text.count("Not shown that removing the top features costs ") == 1
    assert "Is <this> & that so?" in text
    assert "No feature was tested" in text
    assert "The first 50 of 60 features." in text and "The figure shows the first 30." in text
    assert "standard" not in text.replace("standard deviation", "").split("How to reproduce")[0]


def test_where_random_features_are_too_few_nothing_is_said_of_them(tmp_path):
    inputs = make_workspace(tmp_path, kinds=("topk",), top=3, draws=5)
    summary = read_json(inputs["ablate/topk"] / SUMMARY)
    unknown = dict(holds=None, reason="the pool of matched features holds 4 sets")
    result = summary["results"]["behaviours"]["capital"]
    result["grades"] |= dict(harms=dict(holds=True, reason="much"), beyond_matched=unknown, highest="harms")
    write_json(inputs["ablate/topk"] / SUMMARY, summary)
    run = make_run(tmp_path, inputs)
    run_report(run)
    text = (run.folder / "report.md").read_text()
    assert "costs Capital of a country; that it costs more than removing matched random ones is not shown" in text
    assert "Removing these features costs the behaviour. That it costs more than" in text and "clearly" not in text


def test_a_rule_that_says_yes_too_often_stands_first_in_red(tmp_path):
    inputs = make_workspace(tmp_path, kinds=("topk",), top=3, draws=100)
    summary = read_json(inputs["ablate/topk"] / SUMMARY)
    claim = dict(yes=False, p_logit_diff=0.3, p_accuracy=1.0, p_holm=1.0, behaviours=4, low=0.1, high=1.0)
    placebo = dict(placebo_rate=0.02, placebo_low=0.01, placebo_high=0.07, least_draws=79)
    for result in summary["results"]["behaviours"].values():
        result |= dict(claim=claim | placebo)
    write_json(inputs["ablate/topk"] / SUMMARY, summary)
    run = make_run(tmp_path, inputs)
    run_report(run)
    text = (run.folder / "report.md").read_text().replace("\xa0", " ")
    assert "2.0 % of the drawn sets pass by the same rule (1.0 % to 7.0 %)" in text
    assert "too often" not in text
    summary["results"]["behaviours"]["capital"]["claim"] |= dict(placebo_rate=0.2, placebo_low=0.13)
    write_json(inputs["ablate/topk"] / SUMMARY, summary)
    run_report(run)
    said = "The rule says yes too often to random features on: Capital of a country."
    assert said in (run.folder / "report.md").read_text()
    page = (run.folder / "index.html").read_text()
    assert f'<p class="strong alarm">{said}' in page
    assert page.index(said) < page.index("that removing the top features costs")


@pytest.mark.parametrize(
    ("unit", "name", "content"),
    [
        ("baseline", SUMMARY, None),
        ("ablate/topk", SUMMARY, "{"),
        ("train/topk", "metrics.jsonl", None),
        ("train/standard", "metrics.jsonl", '{"tokens": 1}\n'),
        ("train/standard", "metrics.jsonl", "not json\n"),
        ("evaluate/topk", "firing_rate.npy", None),
        ("evaluate/topk", "mean_activation.npy", "x"),
    ],
)
def test_a_missing_or_damaged_input_is_named(tmp_path, unit, name, content):
    inputs = make_workspace(tmp_path)
    (inputs[unit] / name).unlink()
    if content is not None:
        (inputs[unit] / name).write_text(content)
    run = make_run(tmp_path, inputs)
    with pytest.raises(UserError, match=re.escape(str(inputs[unit] / name))):
        run_report(run)
    assert not (run.folder / "index.html").exists()


def test_token_text_keeps_the_leading_space():
    class SentencePiece:
        def convert_ids_to_tokens(self, token):
            return {1: "▁Paris", 2: "is", 3: "<0x0A>"}[token]

        def decode(self, ids, clean_up_tokenization_spaces):
            return {1: "Paris", 2: "is", 3: "\n"}[ids[0]]

    text = token_text(SentencePiece())
    assert [text(1), text(2), text(3)] == [" Paris", "is", "\n"]


def test_results_of_every_unit_are_read_as_classes_and_written_as_they_were(made):
    units = sorted((made[0].parent / "inputs").rglob(SUMMARY))
    assert len(units) == 7
    for path in units:
        results = load_results(path.parent)
        assert dataclasses.is_dataclass(results)
        assert to_json(results) == read_json(path)["results"]

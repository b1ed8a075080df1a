"""The report on what the model can do: the behaviours, before anything is removed, and benchmarks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from saejax.page.blocks import Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.style import BLUE, GREY, INK, height_of, legend, name_rows, panels, point, styled
from saejax.page.tables import MISSING, Table, interval, number, percent
from saejax.page.words import behaviour, signed
from saejax.tasks.baseline import MIN_ACCURACY, SEPARATION_LIMIT
from saejax.tasks.results import BaselineBehaviour, BaselineResults, BenchmarkResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def behaviours_section(findings: Findings, draw: Draw) -> Section:
    """Return the section on the behaviours' scores before anything is ablated."""
    baseline = findings.first(BaselineResults)
    scores_of = {behaviour(name): scores for name, scores in baseline.behaviours.items()}
    untested = tuple(
        Text(f"Left out of the causal tests: {behaviour(name)}, because {why}.", strong=True)
        for name, why in (baseline.left_out or {}).items()
    )
    flagged = [f"{name} ({signed('; '.join(scores.flags))})" for name, scores in scores_of.items() if scores.flags]
    weak = "No behaviour was flagged as weak."
    if flagged:
        weak = f"Flagged as weak, to be read with care: {', '.join(flagged)}."
    examples = tuple(
        (example.text, example.correct.strip(), example.wrong.strip(), number(example.logit_diff))
        for scores in scores_of.values()
        for example in scores.examples[:1]
    )
    columns = ("Prompt", "Correct", "Wrong", "Logit difference")
    shown = Table("One prompt of each", columns, examples, frozenset({1, 2}), note="↵ is a line break.")
    figure = baselines(scores_of)
    alt = "Accuracy on test prompts. " + " ".join(
        f"{name}: {interval(scores.test.accuracy, 0, 100)} %." for name, scores in scores_of.items()
    )
    caption = "What the model can do with nothing removed. A behaviour that it does not have cannot be explained."
    picture = draw("baselines", figure, caption, alt)
    return Section(
        "The behaviours", (*untested, Text(weak, strong=bool(flagged)), shown, picture, _baseline_table(scores_of))
    )


def _baseline_table(scores_of: Mapping[str, BaselineBehaviour]) -> Table:
    rows = tuple(
        (
            f"{name}, {split}",
            interval(scores.accuracy, 0, 100),
            interval(scores.logit_diff),
            interval(scores.separation).replace(number(SEPARATION_LIMIT), "∞"),
            interval(scores.top1, 0, 100),
            interval(scores.answer_accuracy, 0, 100),
            str(scores.n),
        )
        for name, of_splits in scores_of.items()
        for split, scores in of_splits.splits.items()
    )
    note = (
        "Accuracy: the correct answer's first token has a higher logit than the wrong one's. Logit difference: correct "
        "minus wrong, at the prompt's last token. Separation: its mean over its standard deviation. Top-1: the correct "
        "token has the highest logit of all. Whole answer: the correct one is likelier than the wrong one, all their "
        "tokens counted. Features are chosen on train prompts and judged on test prompts, which in "
        "the built-in behaviours share no content with them. Square brackets: 95 % intervals over prompts, Wilson's of "
        "shares, bootstrap of the others."
    )
    columns = ("Behaviour", "Accuracy, %", "Logit difference", "Separation", "Top-1, %", "Whole answer, %", "Prompts")
    return Table("The behaviours before anything is removed", columns, rows, stack=False, note=note)


@styled
def baselines(scores: Mapping[str, BaselineBehaviour]) -> "Figure":
    """Draw the accuracy and the logit difference of each behaviour, before anything is ablated.

    Args:
      scores: by behaviour.
    """
    rows = height_of(scores, 0.36)
    figure, (left, right) = panels(
        (rows + 0.75, rows + 1.0),
        ("Accuracy: correct answer above the wrong one", "Logit of the correct minus the wrong answer"),
    )
    for row, splits in enumerate(scores.values()):
        for split, shift, color, marker in (("test", -0.14, BLUE, "o"), ("train", 0.14, GREY, "s")):
            label = f"{split} prompts, with 95 % interval"
            point(left, splits.splits[split].accuracy, row + shift, color, marker, label, scale=100)
            point(right, splits.splits[split].logit_diff, row + shift, color, marker, label)
    left.axvline(100 * MIN_ACCURACY, color=INK, linewidth=1, linestyle=":")
    left.set(
        xlabel=f"% of prompts (dotted: flagged below {100 * MIN_ACCURACY:.0f} %)",
        xlim=(min(left.get_xlim()[0], 45), 102),
    )
    right.axvline(0, color=INK, linewidth=1)
    right.set_xlabel("logits")
    for axes in (left, right):
        name_rows(axes, list(scores))
    legend(right, 1)
    return figure


def benchmark_sections(findings: Findings) -> list[Section]:
    """Return the section on the model's benchmark scores; no section if no benchmark was run."""
    results = findings.select(BenchmarkResults)
    if not results:
        return []
    rows = [row for name, scores in results.items() for row in _benchmark_rows(name, scores)]
    note = (
        "Exact match: the strict rule takes the answer from the place where it should stand, the flexible one the last "
        "number or formula of the text. An answer that was not found counts as wrong. Multiple choice: the likeliest "
        "of the given answers; normalised: per character. Square brackets: 95 % intervals over items, Wilson's of "
        "shares, bootstrap of the others."
    )
    columns = ("Benchmark", "Measure", "Value", "No answer found", "Items")
    return [Section("Benchmarks", (Table("The model on benchmarks", columns, tuple(rows), frozenset({1}), note=note),))]


def _benchmark_rows(name: str, results: BenchmarkResults) -> list[tuple[str, ...]]:
    n = str(results.n)
    nats, share = results.log_likelihood_per_token, results.token_accuracy
    if nats and share:
        return [
            (name, "log-likelihood of the solution, nats per token", interval(nats, 3), MISSING, n),
            (name, "tokens of the solution predicted, %", interval(share, 1, 100), MISSING, n),
        ]
    if results.unparsed is None:
        chance = f"chance {percent(results.chance)}"
        return [
            (name, f"multiple choice, {rule}, % ({chance})", interval(value, 1, 100), MISSING, n)
            for rule, value in (results.accuracy or {}).items()
        ]
    return [
        (name, f"exact match, {rule}, %", interval(value, 1, 100), str(results.unparsed[rule]), n)
        for rule, value in (results.accuracy or {}).items()
    ]

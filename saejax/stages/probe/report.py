"""The report on linear probes: probe accuracy with controls, and whether ablating selected features has an effect."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from saejax.interventions.probing import ProbedLabel, ProbeFit, ProbeResults
from saejax.page.blocks import Block, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.style import BLUE, GREY, INK, ORANGE, error_lengths, legend, panels, styled
from saejax.page.tables import MISSING, Table, interval, number, percent
from saejax.page.words import WEAK, place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = {
    "behaviour": "Which behaviour",
    "answer": "Answer",
    "parity": "Answer even or odd",
    "correct": "Model right or wrong",
    "number": "Number of the subject",
    "steps": "Number of steps",
    "operation": "Last operation",
}
_INPUTS = {"features": "features", "raw": "raw dimensions"}


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return the section on probes; none if none was asked for."""
    return [_section(results, findings, draw) for results in findings.select(ProbeResults).values()]


def _section(results: ProbeResults, findings: Findings, draw: Draw) -> Section:
    learned = [label for label in results.labels if label.probes]
    intro = (
        f"A linear probe (logistic regression) predicts a label from the features of {results.dictionary}, or from the "
        f"raw activations of {place(results.site)}, at a prompt's last position. It was fitted on train prompts; probe "
        "accuracy is the share of test prompts whose class it predicts. A sparse probe sees only the few features, or "
        "dimensions, whose class means differ most on train prompts. A label that a probe can read need not be used by "
        "the model."
    )
    if congruent := [label for label in learned if label.congruent]:
        intro += (
            f" For the number of the subject, the noun next to the verb was given the subject's number in "
            f"{sum(label.congruent for label in congruent)} prompts, so that this noun does not predict the label."
        )
    blocks: list[Block] = [Text(intro)]
    if learned:
        shuffles = findings.settings()["probe"]["shuffles"]
        shown = {_title(label, findings): label.probes for label in learned}
        caption = (
            "Probe accuracy on test prompts against the number of features, or raw dimensions, that the probe sees, "
            "with 95 % Wilson intervals. Grey: probes fitted on shuffled labels, 5th to 95th percentile over "
            f"{shuffles} shuffles. Dotted: accuracy of always predicting the largest class."
        )
        dense = [
            f"{title}, {_INPUTS[row.input]}: {interval(row.accuracy, 0, 100)} %."
            for title, rows in shown.items()
            for row in rows
            if row.k is None
        ]
        alt = " ".join(["Probe accuracy of probes of all inputs.", *dense])
        blocks += [draw("probes", probes(shown), caption, alt), _table(learned, shuffles, findings)]
    if selected := [label for label in learned if label.selected]:
        blocks.append(_selected_table(selected, findings))
    if findings.weak(label.behaviour for label in learned):
        blocks.append(Text(WEAK))
    if without := [(_title(label, findings), f"no probe: {label.reason}.") for label in results.labels if label.reason]:
        blocks.append(Terms(tuple(without)))
    return Section("Linear probes", tuple(blocks))


def _title(label: ProbedLabel, findings: Findings) -> str:
    of_behaviour = f": {findings.title(label.behaviour)}" if label.behaviour else ""
    return f"{_LABELS.get(label.label, label.label)}{of_behaviour}"


@styled
def probes(labels: Mapping[str, Sequence[ProbeFit]]) -> "Figure":
    """Draw probe accuracy against the number of inputs that a probe sees, of features and of raw activations.

    Args:
      labels: title -> its probes; probes of an input stand in order of k.
    """
    heights = [1.45 + 1.0 / len(labels)] * len(labels)  # the legend takes an inch
    figure, below = panels(heights, list(labels))
    looks = dict(features=(ORANGE, "o", -0.07, "features"), raw=(BLUE, "s", 0.07, "raw dimensions"))
    for axes, rows in zip(below, labels.values(), strict=True):
        sizes = [row.k for row in rows if row.input == rows[0].input]
        lowest, highest = (
            [100 * pick(getattr(row.shuffled, end) for row in rows if row.k == k) for k in sizes]
            for pick, end in ((min, "low"), (max, "high"))
        )
        places = np.arange(len(sizes))
        axes.fill_between(places, lowest, highest, color=GREY, alpha=0.25, linewidth=0, label="shuffled labels")
        axes.axhline(100 * rows[0].majority, color=INK, linewidth=1, linestyle=":", label="largest class")
        for name, (color, marker, shift, label) in looks.items():
            accuracies = [row.accuracy for row in rows if row.input == name]
            lengths_2xK = np.hstack([error_lengths(accuracy, 100) for accuracy in accuracies])
            axes.errorbar(
                places + shift,
                [100 * accuracy.mean for accuracy in accuracies],
                yerr=lengths_2xK,
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.2,
                elinewidth=1.2,
                capsize=2,
                label=f"{label}, with 95 % interval",
            )
        axes.set_xticks(places, [str(k or "all") for k in sizes])
        axes.set(ylim=(-7, 107), yticks=(0, 50, 100), ylabel="%")
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("features, or dimensions, that a probe sees")
    legend(below[-1], 1)
    return figure


def _table(learned: Sequence[ProbedLabel], shuffles: int, findings: Findings) -> Table:
    columns = {
        "Label": lambda label, row: _title(label, findings),
        "Probe sees": lambda label, row: f"{_INPUTS[row.input]}: {row.k or 'all'}",
        "Probe accuracy, %": lambda label, row: interval(row.accuracy, 0, 100),
        "F1": lambda label, row: number(row.f1),
        "Largest class": lambda label, row: percent(row.majority),
        "Shuffled labels, %": lambda label, row: interval(row.shuffled, 0, 100),
        "Controls, %": lambda label, row: interval(row.control, 0, 100),
        "Minus dense, points": lambda label, row: interval(row.against_dense, 0, 100),
        "p": lambda label, row: number(row.p_holm, 4),
        "Inputs": lambda label, row: ", ".join(map(str, (row.inputs or ())[:3])) or MISSING,
    }
    note = (
        "Probe accuracy: 95 % Wilson interval. F1: mean over classes. Shuffled labels: accuracy of probes fitted on "
        "them. Controls: accuracy of probes of as many features matched in firing rate, or of as many random "
        f"directions of the raw activations. Both: mean over {shuffles} draws, 5th and 95th percentile. Minus dense: "
        "probe accuracy minus that of the probe of all raw dimensions, on the same prompts. p: share of permutations "
        "of the test labels with at least this accuracy, after Holm's correction over the labels; neither it nor the "
        "difference where a class has fewer than 6 test prompts, or all are of one class. Inputs: the first three that "
        "a sparse probe sees."
    )
    rows = [(label, row) for label in learned for row in label.probes]
    return Table.of("Probes", rows, columns, {"Probe sees", "Inputs"}, stack=False, note=note)


def _selected_table(labels: Sequence[ProbedLabel], findings: Findings) -> Table:
    """Return the table that says whether the features that probes select are those whose ablation has an effect."""
    columns = {
        "Label": lambda label, row: _title(label, findings),
        "Feature": lambda label, row: str(row.feature),
        "Drop when ablated": lambda label, row: interval(row.drop),
        "p": lambda label, row: number(row.p_holm, 4),
        "Controls at least as large": lambda label, row: (
            f"{sum(abs(drop) >= abs(row.drop.mean) for drop in row.controls)} of {len(row.controls)}"
            if row.controls
            else "not testable"
        ),
    }
    note = (
        "The features that the sparse probe selects, each ablated alone on test prompts. Drop: fall of the logit "
        "difference in logits, or, on benchmarks, of the log-likelihood of the reference answer in nats; 95 % "
        "bootstrap interval over prompts within templates. p: two-sided, from flipped signs of the drops, after Holm's "
        "correction over all features of this table. Controls: random lists of features that change the site as much "
        "as this feature does, whose effect is at least as large in either direction; not testable where no list does, "
        "or so few features fire that the lists are nearly the same."
    )
    rows = [(label, row) for label in labels if label.selected for row in label.selected.features]
    return Table.of("Does the model use the features that probes select?", rows, columns, {"Feature"}, note=note)

"""The report's section on linear probes: what can be read off features and off raw activations."""

from collections.abc import Mapping, Sequence
from typing import Any

from saejax.reporting import figures
from saejax.reporting.document import Block, Picture, Section, Terms, Text
from saejax.reporting.findings import Findings
from saejax.reporting.sections import Draw, behaviour, place
from saejax.reporting.tables import MISSING, Table, interval, number, percent

_LABELS = {
    "behaviour": "Which behaviour",
    "answer": "Answer",
    "parity": "Answer even or odd",
    "correct": "Model right or wrong",
    "number": "Number of the subject",
}
_INPUTS = {"features": "features", "raw": "raw dimensions"}
_POOLS = {
    "last": "at a prompt's last position",
    "max": "as the maximum over a prompt's positions",
    "mean": "as the mean over a prompt's positions",
}


def sections(found: Findings, draw: Draw) -> list[Section]:
    """The probes; no section if none was asked for."""
    return [_section(results, found, draw) for results in found.probes.values()]


def _section(results: Mapping[str, Any], found: Findings, draw: Draw) -> Section:
    learned = [label for label in results["labels"] if label["probes"]]
    intro = (
        f"A linear probe (logistic regression) was given the features of {results['dictionary']}, or the raw "
        f"activations of {place(results['site'])}, {_POOLS[results['pool']]}. It was fitted on train prompts; the "
        "accuracy is that on test prompts. A sparse probe sees only the few features, or dimensions, that separate "
        "the classes best on train prompts. What can be read off, the model need not use."
    )
    without = [(_title(label), f"no probe: {label['reason']}.") for label in results["labels"] if label["reason"]]
    blocks: list[Block] = [Text(intro)]
    if learned:
        shuffles = found.settings()["probe"]["shuffles"]
        blocks += [_picture(learned, shuffles, draw), _table(learned, shuffles)]
    if without:
        blocks.append(Terms(tuple(without)))
    return Section("Linear probes", tuple(blocks))


def _title(label: Mapping[str, Any]) -> str:
    own = f": {behaviour(label['behaviour'])}" if label["behaviour"] else ""
    return f"{_LABELS[label['label']]}{own}"


def _picture(learned: Sequence[Mapping[str, Any]], shuffles: int, draw: Draw) -> Picture:
    panels = {_title(label): label["probes"] for label in learned}
    caption = (
        "Accuracy on the test prompts of probes that see a few features, or dimensions, or all of them, with 95 % "
        "Wilson intervals. Grey: what probes of shuffled labels reach, the 5th to 95th percentile over "
        f"{shuffles} shuffles of either input. Dotted: always naming the largest class."
    )
    alt = "Accuracy of probes of all inputs. " + " ".join(
        f"{title}: "
        + ", ".join(f"{_INPUTS[row['input']]} {_accuracy(row)} %" for row in rows if row["k"] is None)
        + "."
        for title, rows in panels.items()
    )
    return draw("probes", figures.probes(panels), caption, alt)


def _seen(row: Mapping[str, Any]) -> str:
    name = _INPUTS[row["input"]]
    return f"1 {name.removesuffix('s')}" if row["k"] == 1 else f"{row['k'] or 'all'} {name}"


def _accuracy(row: Mapping[str, Any]) -> str:
    return interval(row["accuracy"], 0, 100)


def _table(learned: Sequence[Mapping[str, Any]], shuffles: int) -> Table:
    rows = tuple(
        (
            _title(label),
            _seen(row),
            _accuracy(row),
            percent(row["balanced_accuracy"]),
            percent(row["majority"]),
            interval(row["shuffled"], 0, 100),
            interval(row["random"], 0, 100) if row["random"] else MISSING,
            number(row["p_value"], 4),
            ", ".join(map(str, row["inputs"][:3])) if row["inputs"] else MISSING,
        )
        for label in learned
        for row in label["probes"]
    )
    columns = (
        "Label",
        "Probe sees",
        "Accuracy, %",
        "Balanced",
        "Largest class",
        "Shuffled labels, %",
        "Random inputs, %",
        "p",
        "Inputs",
    )
    note = (
        "Accuracy: on test prompts, with its 95 % Wilson interval. Balanced: mean over classes. Shuffled labels and "
        f"random inputs: mean over {shuffles} draws, and the 5th and 95th percentile. p: share of permutations of the "
        "test labels that agree with the probe as often, not adjusted for the number of probes. Inputs: the first "
        "three that a sparse probe sees."
    )
    return Table("Probes", columns, rows, frozenset({1, 8}), stack=False, note=note)

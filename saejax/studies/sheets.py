"""The tables of a study's report: each a list of figures, shown on the page, and as CSV beside it."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saejax.page.tables import MISSING, Table, interval, number, percent, significant
from saejax.results import Interval, to_json
from saejax.studies.progress import duration
from saejax.studies.results import StudyFigures


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table of a report.

    Attributes:
      name: of its field in ``StudyFigures``, and of its CSV file.
      caption: what it shows.
      columns: heading -> a cell's text, of a figure.
      words: headings of the columns that hold words.
      note: a line below.
      cards: whether rows become cards on a narrow screen, which suits a few columns of words.
    """

    name: str
    caption: str
    columns: Mapping[str, Callable[[Any], str]]
    words: frozenset[str] = frozenset()
    note: str = ""
    cards: bool = False

    def table(self, figures: StudyFigures) -> Table:
        """Its rows as text."""
        rows = tuple(tuple(show(one) for show in self.columns.values()) for one in getattr(figures, self.name))
        words = frozenset(i for i, heading in enumerate(self.columns) if heading in self.words)
        return Table(self.caption, tuple(self.columns), rows, words, self.cards, self.note)

    def csv(self, figures: StudyFigures) -> str:
        """All fields of its figures; an interval is three columns, what is not known is empty."""
        lines = [_flat(to_json(one)) for one in getattr(figures, self.name)]
        names = list(dict.fromkeys(name for line in lines for name in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{end}": inner for end, inner in value.items()}
        else:
            found[name] = ",".join(map(str, value)) if isinstance(value, Sequence) and type(value) is not str else value
    return found


def _listed(items: Sequence[str]) -> str:
    """Names in a cell; of a long list the ends."""
    items = [*items[:2], "...", items[-1]] if len(items) > 4 else list(items)
    return ", ".join(items) or MISSING


def _points(value: Interval | None) -> str:
    return interval(value, 1, 100) if value else MISSING


def answer(value: bool | None, unknown: str = MISSING) -> str:
    """A yes or no."""
    return unknown if value is None else "yes" if value else "no"


def _size(value: int | None) -> str:
    if value is None:
        return MISSING
    unit, scale = ("GB", 1e9) if value >= 1e9 else ("MB", 1e6) if value >= 1e6 else ("kB", 1e3)
    return f"{significant(value / scale)} {unit}"


_AFTER_NOTE = (
    "Top features set to zero, or each replaced, where it fires, by an activation that it has elsewhere. Drops of "
    "accuracy are in percentage points, those of the reference's log-likelihood in nats per token; square brackets: "
    "95 % intervals over items. Random: mean drop without matched random features. p: share of these draws and the top "
    "features that cost at least as much log-likelihood. Verdict: of the rule on accuracy, with p after Holm's "
    "correction over the row's benchmarks; a dash where the model is at chance before any edit, or gives no answers. "
    "Placebo: share of the draws to which the rule says yes."
)
SHEETS = {
    sheet.name: sheet
    for sheet in (
        Sheet(
            "models",
            "The rows",
            {
                "Row": lambda one: one.row,
                "Model": lambda one: one.model,
                "In": lambda one: one.dtype,
                "Parameters": lambda one: MISSING if one.parameters is None else f"{one.parameters:,}",
                "Layers": lambda one: MISSING if one.layers is None else str(one.layers),
                "Width": lambda one: MISSING if one.width is None else f"{one.width:,}",
                "Sites": lambda one: _listed(one.sites),
                "Dictionaries": lambda one: _listed(one.kinds),
                "Benchmarks": lambda one: _listed(one.benchmarks),
                "Behaviours": lambda one: _listed(one.behaviours),
                "Units done": lambda one: f"{one.done} of {one.units}",
            },
            frozenset({"Model", "In", "Sites", "Dictionaries", "Benchmarks", "Behaviours"}),
        ),
        Sheet(
            "baselines",
            "The models before anything is changed",
            {
                "Row": lambda one: one.row,
                "Task": lambda one: one.task,
                "Measure": lambda one: one.measure,
                "Value": lambda one: (
                    interval(one.value, 3) if "nats" in one.measure else f"{interval(one.value, 1, 100)} %"
                ),
                "By guessing": lambda one: percent(one.chance, 1),
                "Items": lambda one: str(one.n),
            },
            frozenset({"Task", "Measure"}),
            "Square brackets: 95 % intervals over items or prompts.",
        ),
        Sheet(
            "dictionaries",
            "The dictionaries",
            {
                "Row": lambda one: one.row,
                "Dictionary": lambda one: one.dictionary,
                "Reads": lambda one: one.site,
                "Features": lambda one: f"{one.features:,}",
                "Loss, epoch 4": lambda one: significant(one.loss_epoch_4, 4),
                "Loss, end": lambda one: significant(one.loss_end, 4),
                "Improvement": lambda one: percent(one.improvement, 1),
                "L0": lambda one: number(one.l0, 1),
                "Dead": lambda one: percent(one.dead, 1),
                "Explained variance": lambda one: number(one.explained_variance, 3),
                "Cross-entropy recovered": lambda one: number(one.ce_recovered, 3),
                "Tokens": lambda one: f"{one.tokens:,}",
                "Seconds": lambda one: number(one.seconds, 0),
            },
            frozenset({"Dictionary", "Reads"}),
            "Losses are means over the recorded steps of an epoch, on training batches; a dash: no more than four "
            "epochs. L0 and what follows it up to the tokens, on held-out text. Tokens: of training, repeats counted. "
            "Seconds: of training all members of a stack together.",
        ),
        Sheet(
            "activations",
            "Activations by model and text",
            {
                "Row": lambda one: one.row,
                "Text": lambda one: one.text,
                "Site": lambda one: one.site,
                "Tokens": lambda one: f"{one.tokens:,}",
                "Median norm": lambda one: significant(one.median_norm),
                "Largest norm": lambda one: significant(one.largest_norm),
                "Sinks beyond position 0": lambda one: percent(one.beyond_sinks, 2),
                "L0": lambda one: number(one.l0, 1),
                "Features that fire": lambda one: percent(one.firing, 1),
                "Explained variance": lambda one: number(one.explained_variance, 3),
            },
            frozenset({"Text", "Site"}),
            "Corpus: what dictionaries are trained on. Benchmarks: test items with their reference answers, sinks left "
            "out; L0, features and explained variance are those of the tested dictionary there.",
        ),
        Sheet(
            "effects",
            "Benchmarks without top features",
            {
                "Row": lambda one: one.row,
                "Benchmark": lambda one: one.benchmark,
                "Replaced": lambda one: one.replacement,
                "Accuracy before, %": lambda one: (
                    _points(one.accuracy_before) + (" (at chance)" if one.at_chance else "")
                ),
                "Accuracy drop": lambda one: _points(one.accuracy_drop),
                "Random": lambda one: number(
                    None if one.accuracy_control_drop is None else 100 * one.accuracy_control_drop, 1
                ),
                "Verdict": lambda one: (
                    MISSING if one.verdict is None else f"{answer(one.verdict)} (p = {number(one.verdict_p, 3)})"
                ),
                "Placebo": lambda one: percent(one.placebo_rate, 1),
                "Log-likelihood drop": lambda one: interval(one.nats_drop, 3),
                "Random, nats": lambda one: number(one.nats_control_drop, 3),
                "p": lambda one: number(one.nats_p, 3),
                "Features": lambda one: f"{one.top} of {one.dictionary}",
                "Draws": lambda one: str(one.draws),
                "Items": lambda one: str(one.items),
            },
            frozenset({"Benchmark", "Replaced", "Verdict", "Features"}),
            _AFTER_NOTE,
        ),
        Sheet(
            "single",
            "Benchmarks without single features",
            {
                "Row": lambda one: one.row,
                "Benchmark": lambda one: one.benchmark,
                "Features": lambda one: str(one.features),
                "Change it": lambda one: str(one.discoveries),
                "Of a draw": lambda one: number(one.control_discoveries, 1),
                "p": lambda one: number(one.p_value, 3),
                "Strongest": lambda one: f"{one.dictionary}/{one.strongest}",
                "Drop, nats": lambda one: interval(one.drop, 3),
                "q": lambda one: number(one.q_value, 3),
                "Above random": lambda one: percent(one.control_percentile),
            },
            frozenset({"Benchmark", "Strongest"}),
            "Top features that fire on the items, each set to zero by itself. Change it: their drops of log-likelihood "
            "have q at most 0.05, by sign flips over items; of a draw: how many of the matched random features do, on "
            "average; p: share of the draws and the top features of which as many do. Above random: share of the "
            "features that draws put in the strongest one's place that cost less.",
        ),
        Sheet(
            "behaviours",
            "Behaviours without top features",
            {
                "Row": lambda one: one.row,
                "Behaviour": lambda one: one.behaviour,
                "Dictionary": lambda one: one.dictionary,
                "Accuracy before": lambda one: percent(one.accuracy, 1),
                "Accuracy drop": lambda one: _points(one.accuracy_drop),
                "Random": lambda one: number(100 * one.control_drop, 1),
                "p (Holm)": lambda one: number(one.p_holm, 3),
                "Placebo": lambda one: percent(one.placebo_rate, 1),
                "Highest answer": lambda one: one.highest.replace("_", " "),
            },
            frozenset({"Behaviour", "Dictionary", "Highest answer"}),
        ),
        Sheet(
            "alignment",
            "Do rows agree on what matters?",
            {
                "Rows": lambda one: f"{one.first}, {one.second}",
                "Benchmark": lambda one: one.benchmark,
                "Ranked": lambda one: one.by,
                "Number": lambda one: str(one.n),
                "Rank correlation": lambda one: number(one.rank_correlation),
                "p (Holm)": lambda one: number(one.p_holm, 4),
                "Partners that fire alike": lambda one: f"up to {number(one.control)}" if one.control else MISSING,
                "Aligned": lambda one: answer(one.aligned),
            },
            frozenset({"Benchmark", "Ranked", "Aligned"}),
            "A dash: fewer than three items or matched features, or no two of a different rank.",
        ),
        Sheet(
            "gates",
            "Interpretable, unstable, or no signal",
            {
                "Row": lambda one: one.row,
                "Benchmark": lambda one: one.benchmark,
                "Gate": lambda one: one.gate,
                "Why": lambda one: one.reason,
                "Random sets called interpretable": lambda one: percent(one.placebo_rate, 1),
            },
            frozenset({"Benchmark", "Gate", "Why"}),
            cards=True,
        ),
        Sheet(
            "transfer",
            "What dictionaries share",
            {
                "Row": lambda one: one.row,
                "Dictionaries": lambda one: f"{one.first}, {one.second}",
                "By": lambda one: one.measure,
                "Pairs": lambda one: interval(one.matched, 2),
                "By chance": lambda one: number(one.matched_null.mean, 2),
                "Shared": lambda one: f"{_points(one.shared)} %",
                "Shared by chance": lambda one: percent(one.shared_null.mean, 1),
            },
            frozenset({"Dictionaries", "By"}),
            "Pairs: mean cosine or correlation of the one-to-one pairs of features with the largest sum. Square "
            "brackets: 95 % intervals over features.",
        ),
        Sheet(
            "tracking",
            "Texts followed through the layers",
            {
                "Row": lambda one: one.row,
                "Text": lambda one: one.text,
                "Tokens": lambda one: str(one.tokens),
                "Layers": lambda one: str(one.sites),
                "Links": lambda one: f"{one.links:,}",
                "Random links": lambda one: MISSING if one.random_links is None else f"{one.random_links:,}",
                "Steps tested": lambda one: str(one.tests),
                "Hurt": lambda one: str(one.hurt),
                "Matched sets that pass": lambda one: percent(one.placebo_rate, 1),
            },
            frozenset({"Text"}),
        ),
        Sheet(
            "criteria",
            "Criteria of success",
            {
                "Criterion": lambda one: one.criterion,
                "Met": lambda one: answer(one.met, "not asked"),
                "Evidence": lambda one: one.evidence,
                "The reasoning study reports": lambda one: one.published or MISSING,
            },
            frozenset({"Met", "Evidence", "The reasoning study reports"}),
            cards=True,
        ),
        Sheet(
            "resources",
            "What it took",
            {
                "Row": lambda one: one.row,
                "Unit": lambda one: one.unit,
                "Time": lambda one: duration(one.seconds),
                "Device-hours": lambda one: significant(one.device_hours, 2),
                "Host memory": lambda one: _size(one.peak_host_bytes),
                "Device memory": lambda one: _size(one.peak_device_bytes),
                "On disk": lambda one: _size(one.disk_bytes),
                "GFLOP/s": lambda one: significant(
                    None if one.flops_per_second is None else one.flops_per_second / 1e9, 2
                ),
            },
            frozenset({"Unit"}),
            "Time and memory: of the process that finished the unit. GFLOP/s: matrix products by formula, over all of "
            "its time. A dash: not measured, or none.",
        ),
        Sheet(
            "failures",
            "What is not done",
            {
                "Row": lambda one: one.row,
                "Unit": lambda one: one.unit,
                "State": lambda one: one.state,
                "Why": lambda one: one.reason,
                "Log": lambda one: one.log or MISSING,
            },
            frozenset({"Unit", "State", "Why", "Log"}),
            cards=True,
        ),
    )
}

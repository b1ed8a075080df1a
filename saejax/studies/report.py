"""The report of a study: results of its rows side by side, and what was learned from them.

The page opens with what was learned: which rows have an effect beyond all controls, which do not, and what could not be
tested; a table of rows by questions, then figures; tables follow, and the rules at the end. Written to
the study's folder: ``index.html`` (complete in itself), ``study.md`` (the same content), ``study.json`` (all figures),
``tables/<name>.csv`` and ``figures/``.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from saejax.files import write_json, write_text
from saejax.page import style
from saejax.page.blocks import Block, Code, Links, Picture, Terms, Text
from saejax.page.document import Section, to_html, to_markdown
from saejax.page.tables import Table
from saejax.results import to_json
from saejax.studies.gate import RULES
from saejax.studies.learned import answers_table, holds, is_untold, overview
from saejax.studies.pictures import draw_drivers, draw_drops, draw_models, draw_trends
from saejax.studies.results import TABLES, StudyFigures
from saejax.studies.sheet import as_csv, duration
from saejax.studies.units import ROWS
from saejax.versions import package_versions
from saejax.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "study.json"
_TITLES = dict(gate="Overall answers", alignment="Alignment")
_WORDS = ("learned", "failures")  # tables of words, which are on the page and in the JSON


def write_report(root: Path, figures: StudyFigures) -> None:
    """Write the report; ``study.json`` last, which says that the others are there."""
    for folder in ("tables", "figures"):
        (root / folder).mkdir(exist_ok=True)
    title = f"A study of {counted(len(figures.models), 'model')}"
    parts, lead = _sections(root, figures), _lead(figures)
    footer = f"Written by saejax {package_versions().get('saejax', '')}".strip() + "."
    for old in (root / "tables").glob("*.csv"):
        old.unlink()
    for name in _files(figures):
        write_text(root / "tables" / f"{name}.csv", as_csv(getattr(figures, name)))
    write_text(root / "study.md", to_markdown(title, lead, parts, footer))
    write_text(root / "index.html", to_html(title, lead, parts, footer))
    write_json(root / FILE, to_json(figures))


def _lead(figures: StudyFigures) -> Sequence[str]:
    gates = [f"{gate.row} on {gate.benchmark}: {gate.gate}" for gate in figures.gates]
    lines = [f"{counted(len(figures.models), 'row')}, each a model in a folder of its own."]
    if gates:
        lines.append("; ".join(gates) + ".")
    if figures.failures:
        failed = sum(failure.state == "failed" for failure in figures.failures)
        skipped = len(figures.failures) - failed
        missing = f"{counted(failed, 'unit')} failed"
        missing += f", and {skipped} that depend on them were skipped" if skipped else ""
        lines.append(f"Not everything was done: {missing}; the last section says why.")
    return lines


def _sections(root: Path, figures: StudyFigures) -> list[Section]:
    """Return the sections of the page; what no row ran has none, and is named in the last one."""
    rules = [Code(_TITLES[name], "\n".join(textwrap.wrap(rule, 96))) for name, rule in RULES.items()]
    took = Text(f"All units together took {duration(sum(model.seconds for model in figures.models))}.")
    sections: dict[str, Iterable[Block]] = {
        "What was learned": _learned(root, figures),
        "Causal effects": _tables(figures, "effects", "behaviours"),
        "Reasoning primitives": _primitives(root, figures),
        "Features and categories": _associations(figures),
        "Words or context": _tables(figures, "drivers"),
        "The same problem in every model": _tables(figures, "problems"),
        "Alignment": _alignment(root, figures),
        "From layer to layer": _tables(figures, "transfer", "tracking"),
        "Before anything is changed": _dictionaries(root, figures),
        "Answers and rules": (*_tables(figures, "learned"), *rules),
        "Setup": (*_tables(figures, "models"), took, _reports(root, figures)),
        "What is not done": (*_tables(figures, "failures"), *_not_run(figures)),
    }
    return [Section(title, blocks) for title, some in sections.items() if (blocks := tuple(some))]


def _not_run(figures: StudyFigures) -> Iterator[Text]:
    """Yield what no row ran, with the flags that ask for it."""
    optional = dict(
        gates="feature ablation on a benchmark (--study.benchmarks)",
        drivers="injected tokens (--study.falsify)",
        domains="two benchmarks (--study.benchmarks)",
        transfer="comparisons of dictionaries (--transfer.dictionaries)",
        tracking="texts followed through the layers (--track.prompts)",
    )
    if not figures.failures:
        yield Text("All units finished.")
    if missing := [text for name, text in optional.items() if not getattr(figures, name)]:
        yield Text(f"No row ran: {'; '.join(missing)}.")


def _learned(root: Path, figures: StudyFigures) -> Iterator[Block]:
    """Yield what the page opens with: which rows pass all controls, the table of answers, and figures."""
    if not figures.learned:
        yield Text("No row ran feature ablation on a benchmark (--study.benchmarks), so nothing was learned about it.")
        return
    yield Terms(overview(figures))
    yield answers_table(figures.learned)
    yield from _tables(figures, "gates")
    if figures.gates:
        yield Terms(tuple((f"Why: {gate.row}, {gate.benchmark}", gate.reason) for gate in figures.gates))
    if figures.effects:
        figure = draw_drops(
            "Log-likelihood of the answers lost under ablation",
            [f"{effect.row}, {effect.benchmark}" for effect in figures.effects],
            [{"top features, with their 95 % interval": effect.nats_drop} for effect in figures.effects],
            [
                {"random sets": effect.random_nats, "untrained dictionaries": effect.untrained_nats}
                for effect in figures.effects
            ],
        )
        caption = "Effects of the top features, compared with control sets at equal dose."
        yield _picture(root, "study_effects", figure, caption)
    if figures.drivers:
        caption = "Shares of features that fire on words alone, compared with random features and a random dictionary."
        yield _picture(root, "study_drivers", draw_drivers(figures.drivers), caption)


def _primitives(root: Path, figures: StudyFigures) -> Iterator[Block]:
    """Yield the groups of features that matter for the same items."""
    if not figures.primitives:
        if figures.gates:
            compared = [row.can_name for row in figures.effects if row.categories > 1]
            few = " Too few items chose features to name one." * (bool(compared) and not any(compared))
            yield Text(f"No group of features was stable: no row has a primitive.{few}")
        return
    named = [primitive for primitive in figures.primitives if primitive.name]
    held = [primitive for primitive in named if holds(primitive)]
    sentence = (
        f"{counted(len(figures.primitives), 'stable group')} of features: {len(named)} with a category, of which "
        f"{len(held)} also lower its answers more than both kinds of control sets and recur in at least half "
        "of the other seeds."
    )
    if untold := sum(map(is_untold, named)):
        sentence += f" {counted(untold, 'group')} with a category could not be tested."
    if held:
        sentence += f" They are: {'; '.join(f'{primitive.name} in {primitive.row}' for primitive in held)}."
    if any(not primitive.seeds for primitive in named):
        sentence += " Without dictionaries of other seeds (--study.repeats) it cannot be told whether a group recurs."
    yield Text(sentence)
    ablated = [primitive for primitive in figures.primitives if primitive.effect is not None]
    if ablated:
        figure = draw_drops(
            "Log-likelihood lost when a group is ablated",
            [f"{group.row}: {group.name or 'no category'}" for group in ablated],
            [{"on items of its category": group.effect, "on other items": group.elsewhere} for group in ablated],
            [{"random sets": group.random, "sets chosen for corrupted answers": group.placebo} for group in ablated],
        )
        caption = "The effect of ablating each group, compared with control sets at equal dose."
        yield _picture(root, "study_primitives", figure, caption)
    yield from _tables(figures, "primitives")


def _associations(figures: StudyFigures) -> Iterator[Block]:
    """Yield which features go with which label, by three ways of asking."""
    if not figures.labels:
        return
    tested = [association for association in figures.associations if association.agree is not None]
    agree = sum(bool(association.agree) for association in tested)
    if tested:
        yield Text(f"For {agree} of {len(tested)} top features correlation, probe and ablation give the same answer.")
    else:
        yield Text("No top feature has all three answers: of correlation, of a probe and of ablation.")
    if read := sum(association.probe == "yes" and association.causal == "no" for association in tested):
        yield Text(
            f"A probe of {counted(read, 'top feature')} finds the label of new items, but ablating it does not cost "
            "these items more than others."
        )
    if used := sum(association.probe == "no" and association.causal == "yes" for association in tested):
        yield Text(
            f"Ablating {counted(used, 'top feature')} costs items of the label more, but a probe does not find it."
        )
    yield from _tables(figures, "associations", "labels")


def _alignment(root: Path, figures: StudyFigures) -> Iterator[Block]:
    """Yield which rows agree on what matters, a heatmap of the features that they share, and other benchmarks."""
    for benchmark in dict.fromkeys(pair.benchmark for pair in figures.alignment if pair.shared is not None):
        pairs = [pair for pair in figures.alignment if pair.benchmark == benchmark]
        rows = [model.row for model in figures.models if any(model.row in (pair.first, pair.second) for pair in pairs)]
        caption = f"Features of two rows that are active at the same tokens of {benchmark}, and how many by chance."
        yield _picture(root, f"study_models_{benchmark}", draw_models(rows, pairs), caption)
    yield from _tables(figures, "alignment", "domains")


def _dictionaries(root: Path, figures: StudyFigures) -> Iterator[Block]:
    """Yield the models, their activations, and their dictionaries."""
    yield from _tables(figures, "baselines", "activations")
    if figures.dictionaries:
        widths = {model.row: model.width for model in figures.models if model.width}
        if any(dictionary.row in widths for dictionary in figures.dictionaries):
            caption = "Normalised error (1 - explained variance) of every dictionary on held-out text."
            yield _picture(root, "study_trends", draw_trends(figures.dictionaries, widths), caption)
        yield Text(trend_sentence(figures))
    yield from _tables(figures, "dictionaries")


def trend_sentence(figures: StudyFigures) -> str:
    """Return how errors and activations differ between rows, in one sentence each."""
    errors: dict[str, list[float]] = {}
    for dictionary in figures.dictionaries:
        errors.setdefault(dictionary.row, []).append(1 - dictionary.explained_variance)
    means = {row: sum(some) / len(some) for row, some in errors.items()}
    low, high = (function(means, key=lambda row: means[row]) for function in (min, max))
    text = f"The mean normalised error is {means[low]:.2f} in {low}"
    text += f", the smallest, and {means[high]:.2f} in {high}, the largest." if low != high else "."
    norms = sorted((site.median_norm, f"{site.row}, {site.text}, {site.site}") for site in figures.activations)
    if len(norms) > 1:
        (least, low), (most, high) = norms[0], norms[-1]
        text += f" The median norm of activations ranges from {least:.3g} ({low}) to {most:.3g} ({high})."
    return text


def _picture(root: Path, name: str, figure: "Figure", caption: str) -> Picture:
    return Picture(name, style.inline(style.save(figure, root / "figures", name), name, caption), caption, caption)


def _tables(figures: StudyFigures, *names: str) -> tuple[Table, ...]:
    """Return the tables of these names that have rows."""
    return tuple(TABLES[name].table(rows) for name in names if (rows := getattr(figures, name)))


def _files(figures: StudyFigures) -> list[str]:
    """Return the tables that are written as files: those with figures, not words alone."""
    return [name for name in TABLES if getattr(figures, name) and name not in _WORDS]


def _reports(root: Path, figures: StudyFigures) -> Links:
    """Return the rows' own reports, and the files of this one's figures."""
    rows = [model.row for model in figures.models if (root / ROWS / model.row / "report" / "index.html").exists()]
    items = [(f"The report of {row}", f"{ROWS}/{quote(row)}/report/index.html") for row in rows]
    items += [(FILE, FILE), *((f"tables/{name}.csv", f"tables/{name}.csv") for name in _files(figures))]
    return Links("More, and all figures as files", tuple(items))

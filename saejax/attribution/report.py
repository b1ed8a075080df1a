"""The report on attribution graphs: what was traced, how much of it features explain, and whether the edges hold."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from saejax.attribution.forms import figure as graph_figure
from saejax.attribution.results import AttributeResults, CurveResults, GraphResults, GraphTarget
from saejax.errors import UserError
from saejax.page import style
from saejax.page.document import Block, Links, Picture, Section, Terms, Text
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, number, percent, significant, visible
from saejax.workspace import write_text

SHOWN = 6  # graphs whose figures are on the page; the others are in the tables and have links
_ENLARGED = 1.3  # the figures are for print, with text of 6.5 points
_LOW, _HIGH = -0.5, 1.5  # of the shares that the curves show
_PANELS = dict(
    faithfulness="Faithfulness: the graph alone",
    incompleteness="Incompleteness: all but the graph",
)


@dataclasses.dataclass(frozen=True)
class ReportedGraph:
    """A graph that the report shows.

    Attributes:
      number: its place in the report, from 1.
      folder: of the unit that made it.
      slug: its name there.
      transcoders: the set that it was made with.
      results: what the stage ``attribute`` says of it.
    """

    number: int
    folder: Path
    slug: str
    transcoders: str
    results: GraphResults

    @property
    def name(self) -> str:
        """Its name on the page: of several units two may have the same slug."""
        return f"Graph {self.number}: {self.slug}"

    @property
    def curve(self) -> CurveResults | None:
        """Its curves; None if none were measured, or none is defined."""
        curve = self.results.circuits
        return curve if curve and any(map(_known, curve.faithfulness)) else None

    @property
    def correlation(self) -> float | None:
        """Of edges with what happens when features are doubled and nothing is held; None: not known."""
        return self.results.doubling.free.pearson if self.results.doubling else None


def lead(graphs: Sequence[ReportedGraph]) -> str:
    """A paragraph on all graphs for the beginning of the report."""
    explained = [graph.results.scores.replacement for graph in graphs]
    prompts = "One prompt was" if len(graphs) == 1 else f"{len(graphs)} prompts were"
    said = (
        f"{prompts} traced into attribution graphs, which say what in all layers made the answer. Of the influence on "
        f"it {_range(explained, percent)} comes from the prompt's tokens through features; the rest starts at what "
        "the transcoders do not explain."
    )
    correlations = [value for value in (graph.correlation for graph in graphs) if value is not None]
    if correlations:
        said += (
            " What the edges foretell has a correlation of "
            f"{_range(correlations, number)} with what happens when features are doubled."
        )
    return said


def sections(found: Findings, draw: Draw) -> list[Section]:
    """A table of all graphs, their curves, and the figures of the first ones; no section if there are none.

    Raises:
      UserError: the figure of a graph is missing.
    """
    graphs, report = _traced(found), found.report
    if not graphs:
        return []
    several = "Graphs were" if len(graphs) > 1 else "The graph was"
    intro = (
        "An attribution graph says, of one prompt, what made what: an edge's weight is what its source (a token, a "
        "feature, or what the transcoders miss: an error) adds to its target (a feature or a logit) while attention "
        f"and norms stay as they were. {several} pruned to the nodes and edges with the most influence on the answer."
    )
    blocks: list[Block] = [Text(intro), *_tables(graphs), _meaning(graphs)]
    if any(graph.curve for graph in graphs):
        blocks.append(_curves(graphs, draw))
    undefined = [graph.name for graph in graphs if graph.results.circuits and not graph.curve]
    if undefined:
        blocks.append(
            Text(f"No curves of {'; '.join(undefined)}: the answer is the same without any feature and error.")
        )
    if graphs[SHOWN:]:
        blocks.append(Links("Pages of the other graphs", tuple(_link(graph, report) for graph in graphs[SHOWN:])))
    first = Section("Attribution graphs", tuple(blocks), lead=lead(graphs))
    return [first, *(_section(graph, report) for graph in graphs[:SHOWN])]


def _traced(found: Findings) -> list[ReportedGraph]:
    every = [
        (found.folders[f"attribute/{unit}"], slug, results.transcoders, graph)
        for unit, results in found.each(AttributeResults).items()
        for slug, graph in results.graphs.items()
    ]
    return [ReportedGraph(number, *one) for number, one in enumerate(every, 1)]


def _known(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def _range(values: Sequence[float], written: Callable[[float], str]) -> str:
    """The smallest and the largest, or the one that both are."""
    return " to ".join(dict.fromkeys(written(value) for value in (min(values), max(values))))


def _tables(graphs: Sequence[ReportedGraph]) -> list[Table]:
    """A table for each set of transcoders."""
    columns = (
        "Graph", "Answer", "Active features", "Traced", "Features kept", "Errors kept", "Edges", "Replacement",
        "Completeness", "Edges off by", "Correlation",
    )  # fmt: skip
    names = list(dict.fromkeys(graph.transcoders for graph in graphs))
    return [
        Table(
            f"Graphs with the transcoders {_short(name, names)}",
            columns,
            tuple(_row(graph) for graph in graphs if graph.transcoders == name),
            frozenset({1}),
            stack=False,
        )
        for name in names
    ]


def _short(name: str, names: Sequence[str]) -> str:
    """The last two parts of a path, which all of a hub id are, unless others have the same."""
    short = ["/".join(Path(other).parts[-2:]) for other in names]
    return short[names.index(name)] if len(set(short)) == len(short) else name


def _row(graph: ReportedGraph) -> tuple[str, ...]:
    results, doubling = graph.results, graph.results.doubling
    labels = [_shown(target.label) for target in results.targets]
    counts = results.active, results.traced, results.features, results.errors, results.edges
    return (
        f"{graph.number}: {graph.slug}",
        labels[0] + (f" and {len(labels) - 1} more" if labels[1:] else ""),
        *(f"{count:,}" for count in counts),
        number(results.scores.replacement),
        number(results.scores.completeness),
        significant(doubling.held_error, 2) if doubling else MISSING,
        number(graph.correlation),
    )


def _meaning(graphs: Sequence[ReportedGraph]) -> Terms:
    """What the columns of the tables are."""
    said = {
        "Traced": "active features that have a node, the most influential ones.",
        "Replacement": "of the influence on the answer, which starts at tokens and at errors, the share of the tokens: "
        "1 if features explain all, 0 if errors do.",
        "Completeness": "the share of the nodes' input, weighted by their influence, that no error gives. This score "
        "and the last are of the whole graph, before pruning.",
    }
    if any(graph.results.doubling for graph in graphs):
        said |= {
            "Edges off by": "features were raised one by one with all held as the graph has it; the largest "
            "difference between an edge and what happened, over the largest edge. More than rounding, about 1e−5, is "
            "an error of the arithmetic.",
            "Correlation": "of edges with what happened when features were doubled and nothing was held: how well the "
            "picture drawn on this prompt foretells the model.",
        }
    return Terms(tuple(said.items()))


def _curves(graphs: Sequence[ReportedGraph], draw: Draw) -> Picture:
    shown = {graph.name: graph.curve for graph in graphs if graph.curve}
    kept = next(iter(shown.values())).share
    caption = (
        "Each graph was pruned to growing shares of its influence, and the model run with these features and errors "
        "alone (above), and with all others alone (below). 0 is the first answer's logit without any feature and "
        "error, 1 that of the model. A part that does the work is near 1 above and near 0 below."
    )
    if any(
        not _LOW <= v <= _HIGH
        for curve in shown.values()
        for kind in _PANELS
        for v in getattr(curve, kind)
        if _known(v)
    ):
        caption += " Values beyond the panels are drawn at their edges."
    if len(shown) > len(style.LINES):
        caption += " Grey: each graph; blue: their median."
    alt = "Faithfulness and incompleteness. " + " ".join(
        f"{name}: alone {number(curve.faithfulness[middle])}, all others {number(curve.incompleteness[middle])} "
        f"at {percent(kept[middle])} of the influence."
        for name, curve in shown.items()
        for middle in [len(curve.share) // 2]
    )
    return draw("graph_curves", curves(shown), caption, alt)


@style.styled
def curves(shown: Mapping[str, CurveResults]) -> Figure:
    """Faithfulness and incompleteness by the share of influence that is kept, a line for each graph.

    Args:
      shown: by name; None or NaN leaves a gap. Of more graphs than there are styles of lines all are grey, and their
        median stands out.
    """
    many = len(shown) > len(style.LINES)
    legend_inches = 0.35 + 0.17 * (2 if many else len(shown))
    figure, below = style.panels([1.9, 1.9 + legend_inches], list(_PANELS.values()))
    for axes, kind in zip(below, _PANELS, strict=True):
        lines = {name: np.array(getattr(curve, kind), float) for name, curve in shown.items()}
        for (name, line_C), place in zip(lines.items(), range(len(lines)), strict=True):
            color, dashes, marker = (style.GREY, "-", "") if many else style.LINES[place]
            look = dict(alpha=0.5, linewidth=1.0) if many else dict(markersize=3.5, linewidth=1.4)
            share_C, shown_C = 100 * np.array(shown[name].share), np.clip(line_C, _LOW, _HIGH)
            label = "a graph" if many else name
            axes.plot(share_C, shown_C, color=color, linestyle=dashes, marker=marker, label=label, **look)
        if many:
            axes.plot(*_median(shown, kind), color=style.BLUE, marker="o", markersize=3.5, label="median of the graphs")
        for level in (0, 1):
            axes.axhline(level, color=style.INK, linewidth=0.8, linestyle="-" if level == 0 else ":")
        axes.set(xlim=(0, 102), ylim=(_LOW - 0.1, _HIGH + 0.1), ylabel="share")
        axes.yaxis.set_major_locator(MultipleLocator(0.5))
        axes.grid(axis="y", color=style.INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("% of the influence that is kept")
    style.legend(below[-1], 1)
    return figure


def _median(shown: Mapping[str, CurveResults], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Of all graphs, at every share that one of them has: the shares in per cent, and the medians of known values."""
    points: dict[float, list[float]] = {}
    for curve in shown.values():
        for share, value in zip(curve.share, getattr(curve, kind), strict=True):
            if _known(value):
                points.setdefault(share, []).append(value)
    share_C = np.array(sorted(points))
    return 100 * share_C, np.clip([np.median(points[share]) for share in share_C], _LOW, _HIGH)


def _section(graph: ReportedGraph, report: Path) -> Section:
    results = graph.results
    said = f"Prompt: “{_shown(results.prompt)}”. Explained: {_targets(results.targets)}."
    blocks = (Text(said), _picture(graph, report), Links("", (_link(graph, report),)))
    return Section(graph.name, blocks, level=3)


def _shown(text: str) -> str:
    """A text on one line, spaces at its ends left out."""
    return visible(text).strip() or "␣"


def _targets(targets: Sequence[GraphTarget], most: int = 5) -> str:
    """Tokens with their probabilities, differences with their logits; of many, the first ones."""
    said = [
        f"{_shown(target.label)} "
        + (f"(difference of {number(target.logit)})" if " - " in target.label else f"({_chance(target)})")
        for target in targets[:most]
    ]
    rest = f", and {len(targets) - most} more" if len(targets) > most else ""
    return ", ".join(said) + rest


def _chance(target: GraphTarget) -> str:
    return percent(target.weight, 0 if target.weight >= 0.1 else 1)


def _picture(graph: ReportedGraph, report: Path) -> Picture:
    """The stage's own figure, with the page's colours in place of its own."""
    name, results = f"graph_{graph.number}_{graph.slug}", graph.results
    path = graph.folder / f"{graph.slug}.svg"
    try:
        svg = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} is missing or damaged: delete {graph.folder} and run attribute again") from None
    write_text(report / "figures" / f"{name}.svg", svg)
    caption = (
        f"The most influential of {results.features:,} features (rounded boxes, named by their numbers) and "
        f"{results.errors:,} errors (broken outline), the strongest edges between them, and the tokens and logits. "
        "From below: layer by layer. Across: the prompt's positions."
    )
    explained, complete = results.scores.replacement, results.scores.completeness
    alt = (
        f"Attribution graph of “{_shown(results.prompt)}” with {results.features:,} features, "
        f"{results.errors:,} errors and {results.edges:,} edges; replacement score {number(explained)}, "
        f"completeness {number(complete)}."
    )
    colours = {graph_figure.CARD: "--card", graph_figure.PAPER: "--paper", graph_figure.SOFT: "--soft"}
    colours[graph_figure.LINE] = "--line"
    own = re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)
    width = f"{_ENLARGED * float(own[1]):.0f}pt" if own else "100%"
    return Picture(name, style.inline(svg, name, alt, colours), caption, alt, "svg", width)


def _link(graph: ReportedGraph, report: Path) -> tuple[str, str]:
    page = Path(os.path.relpath(graph.folder / f"{graph.slug}.html", report)).as_posix()
    return f"Open the interactive page of {graph.name[0].lower()}{graph.name[1:]}", quote(page)

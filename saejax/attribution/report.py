"""The report on attribution graphs: what was traced, how much of it features explain, and whether the edges hold."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from saejax.attribution.forms import figure as graph_figure
from saejax.attribution.report_graphs import ReportedGraph, curves, meaning, missed, one_line, span, tables
from saejax.attribution.results import AttributeResults, GraphTarget
from saejax.errors import UserError
from saejax.files import write_text
from saejax.page import style
from saejax.page.blocks import Block, Links, Picture, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import number, percent

SHOWN = 6  # graphs whose figures are on the page; the others are in the tables and have links
_ENLARGED = 1.3  # the figures are for print, with text of 6.5 points


def lead(graphs: Sequence[ReportedGraph]) -> str:
    """Return a paragraph on all graphs for the beginning of the report."""
    explained = [graph.results.scores.replacement for graph in graphs]
    prompts = "One prompt was" if len(graphs) == 1 else f"{len(graphs)} prompts were"
    paragraph = (
        f"{prompts} traced into attribution graphs, which say what in all layers made the answer. Of the influence on "
        f"it {span(explained, percent)} comes from the prompt's tokens through features; the rest starts at what "
        f"the {missed(graphs)} do not explain."
    )
    correlations = [value for value in (graph.correlation for graph in graphs) if value is not None]
    if correlations:
        paragraph += (
            " What the edges foretell has a correlation of "
            f"{span(correlations, number)} with what happens when features are doubled."
        )
    return paragraph


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a table of all graphs, and the figures of the first ones; no section if there are none.

    Raises:
      UserError: the figure of a graph is missing.
    """
    graphs, report = _traced(findings), findings.report
    if not graphs:
        return []
    several = "Graphs were" if len(graphs) > 1 else "The graph was"
    stays = " while attention and norms stay as they were"
    if any(graph.saes for graph in graphs):
        every = all(graph.saes for graph in graphs)
        stays = f"{'' if every else stays}, {'' if every else 'with SAEs '}as gradients estimate it"
    intro = (
        "An attribution graph says, of one prompt, what made what: an edge's weight is what its source (a token, a "
        f"feature, or what the {missed(graphs)} miss: an error) adds to its target (a feature or a logit){stays}. "
        f"{several} pruned to the nodes and edges with the most influence on the answer."
    )
    blocks: list[Block] = [Text(intro), *tables(graphs), meaning(graphs), *curves(graphs)]
    if graphs[SHOWN:]:
        blocks.append(Links("Pages of the other graphs", tuple(_link(graph, report) for graph in graphs[SHOWN:])))
    first = Section("Attribution graphs", tuple(blocks), lead=lead(graphs))
    return [first, *(_section(graph, report) for graph in graphs[:SHOWN])]


def _traced(findings: Findings) -> list[ReportedGraph]:
    every = [
        (
            findings.folders[f"attribute/{unit}"],
            slug,
            results.transcoders or ",".join(results.dictionaries),
            saes,
            graph,
        )
        for unit, results in findings.each(AttributeResults).items()
        for saes in [bool(results.dictionaries)]
        for slug, graph in results.graphs.items()
    ]
    return [ReportedGraph(number, *fields) for number, fields in enumerate(every, 1)]


def _section(graph: ReportedGraph, report: Path) -> Section:
    results = graph.results
    summary = f"Prompt: “{one_line(results.prompt)}”. Explained: {_targets(results.targets)}."
    blocks = (Text(summary), _picture(graph, report), Links("", (_link(graph, report),)))
    return Section(graph.name, blocks, level=3)


def _targets(targets: Sequence[GraphTarget], most: int = 5) -> str:
    """Return tokens with their probabilities and differences with their logits; of many, the first ones."""
    descriptions = [
        f"{one_line(target.label)} "
        + (f"(difference of {number(target.logit)})" if " - " in target.label else f"({_chance(target)})")
        for target in targets[:most]
    ]
    rest = f", and {len(targets) - most} more" if len(targets) > most else ""
    return ", ".join(descriptions) + rest


def _chance(target: GraphTarget) -> str:
    return percent(target.weight, 0 if target.weight >= 0.1 else 1)


def _picture(graph: ReportedGraph, report: Path) -> Picture:
    """Return the figure that the stage wrote, in the colours of the page."""
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
        f"Attribution graph of “{one_line(results.prompt)}” with {results.features:,} features, "
        f"{results.errors:,} errors and {results.edges:,} edges; replacement score {number(explained)}, "
        f"completeness {number(complete)}."
    )
    colours = {graph_figure.CARD: "--card", graph_figure.PAPER: "--paper", graph_figure.SOFT: "--soft"}
    colours[graph_figure.LINE] = "--line"
    width_match = re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)
    width = f"{_ENLARGED * float(width_match[1]):.0f}pt" if width_match else "100%"
    return Picture(name, style.inline(svg, name, alt, colours), caption, alt, "svg", width)


def _link(graph: ReportedGraph, report: Path) -> tuple[str, str]:
    page = Path(os.path.relpath(graph.folder / f"{graph.slug}.html", report)).as_posix()
    return f"Open the interactive page of {graph.name[0].lower()}{graph.name[1:]}", quote(page)

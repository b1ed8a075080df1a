"""The report on attribution graphs: what was traced, how much of it features explain, and whether the edges hold."""

from collections.abc import Callable, Sequence

import numpy as np

from saejax.attribution.results import AttributeResults, DoublingResults, GraphResults
from saejax.page.blocks import Block, Links, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number, percent, significant
from saejax.unicode import visible

Row = tuple[str, GraphResults]  # of a table: a graph's name in the report, and what the stage says of it


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section with tables of all graphs, and links to their pages; none if there are none."""
    tables: dict[str, list[Row]] = {}  # by the set that graphs were made with
    kinds, links = set[str](), list[tuple[str, str]]()
    for unit, results in findings.each(AttributeResults).items():
        kind, named = ("SAEs", results.dictionaries) if results.dictionaries else ("transcoders", [results.transcoders])
        kinds.add(kind)
        for slug, graph in results.graphs.items():
            name = f"{len(links) + 1}: {slug}"  # of several units two may have the same slug
            tables.setdefault(f"Graphs with the {kind} {', '.join(named)}", []).append((name, graph))
            address = findings.address(findings.folders[f"attribute/{unit}"] / f"{slug}.html")
            links.append((f"{name}: {_one_line(graph.prompt)}", address))
    if not links:
        return []
    rows, missed = [row for table in tables.values() for row in table], " or ".join(sorted(kinds, reverse=True))
    several = "Graphs were" if len(rows) > 1 else "The graph was"
    stays = {
        "transcoders": " while attention and norms stay as they were",
        "SAEs": f", {'with SAEs ' if len(kinds) > 1 else ''}as gradients estimate it",
    }
    intro = (
        "An attribution graph says, of one prompt, what made what: an edge's weight is what its source (a token, a "
        f"feature, or what the {missed} miss: an error) adds to its target (a feature or a logit)"
        f"{''.join(stays[kind] for kind in sorted(kinds, reverse=True))}. {several} pruned to the nodes and edges with "
        "the most influence on the answer."
    )
    blocks: list[Block] = [Text(intro), *_tables(tables), _meaning(rows), *_curves(rows)]
    blocks.append(Links("Interactive pages of the graphs, and their prompts", tuple(links)))
    return [Section("Attribution graphs", tuple(blocks), lead=_lead(rows, missed))]


def _lead(rows: Sequence[Row], missed: str) -> str:
    """Return a paragraph on all graphs for the beginning of the report."""
    prompts = "One prompt was" if len(rows) == 1 else f"{len(rows)} prompts were"
    explained = _span([graph.scores.replacement for _, graph in rows], percent)
    traced = _span([graph.traced / max(graph.active, 1) for _, graph in rows], percent)
    paragraph = (
        f"{prompts} traced into attribution graphs, which say what in all layers made the answer. With {traced} of the "
        f"active features traced, {explained} of the influence on it comes from the prompt's tokens through features; "
        f"the rest starts at what the {missed} do not explain."
    )
    correlations = [_doubling(graph).correlation for _, graph in rows]
    if measured := [value for value in correlations if value is not None]:
        paragraph += (
            f" What the edges foretell has a correlation of {_span(measured, number)} with what happens when "
            "features are doubled."
        )
    return paragraph


def _doubling(graph: GraphResults) -> DoublingResults:
    """Return the results of doubling features; those of no feature where it was not requested."""
    return graph.doubling or DoublingResults(0, None, None)


def _tables(tables: dict[str, list[Row]]) -> list[Table]:
    """Return a table for each set of transcoders or SAEs."""
    columns: dict[str, Callable[[str, GraphResults], str]] = {
        "Graph": lambda name, graph: name,
        "Answer": lambda name, graph: _answer([target.label for target in graph.targets]),
        "Active features": lambda name, graph: f"{graph.active:,}",
        "Traced": lambda name, graph: f"{graph.traced:,} ({percent(graph.traced / max(graph.active, 1))})",
        "Features kept": lambda name, graph: f"{graph.features:,}",
        "Errors kept": lambda name, graph: f"{graph.errors:,}",
        "Edges": lambda name, graph: f"{graph.edges:,}",
        "Replacement": lambda name, graph: number(graph.scores.replacement),
        "Completeness": lambda name, graph: number(graph.scores.completeness),
        "Untraced input": lambda name, graph: percent(graph.untraced, 1),
        "Edges off by": lambda name, graph: significant(_doubling(graph).held_error, 2),
        "Correlation": lambda name, graph: number(_doubling(graph).correlation),
    }
    return [Table.of(title, rows, columns, ["Answer"], stack=False) for title, rows in tables.items()]


def _curves(graphs: Sequence[Row]) -> list[Table]:
    """Return a table of graphs whose parts were run alone; none where no graph's were, or no value is finite."""
    rows = []
    for name, graph in graphs:
        curve = graph.circuits
        if curve and any(value is not None and np.isfinite(value) for value in curve.faithfulness):
            fields = curve.share, curve.features, curve.errors, curve.faithfulness, curve.incompleteness
            for share, features, errors, faithful, incomplete in zip(*fields, strict=True):
                counts = percent(share), f"{features:,}", f"{errors:,}"
                rows.append((name, *counts, number(faithful), number(incomplete)))
    columns = ("Graph", "Influence kept", "Features", "Errors", "Faithfulness", "Incompleteness")
    note = (
        "The model was run with the kept features and errors alone. Faithfulness is the first target in that run: "
        "1 is the whole model and 0 the model without any feature and error. Incompleteness is the same of all that "
        "was not kept: 0 if the kept part does all the work."
    )
    return [Table("Parts of the graphs run alone", columns, tuple(rows), note=note)] if rows else []


def _meaning(rows: Sequence[Row]) -> Terms:
    """Return what the columns of the tables are."""
    meanings = {
        "Traced": "active features that have a node, the most influential ones.",
        "Replacement": "of the influence on the answer, which starts at tokens and at errors, the share of the tokens: "
        "1 if features explain all, 0 if errors do.",
        "Completeness": "the share of the nodes' input, weighted by their influence, that no error gives. This score "
        "and the last are of the graph before pruning, and depend on the share of active features that was traced: "
        "compare sets only where it is equal.",
        "Untraced input": "what active features without a node add to targets, by size, over the targets' values.",
    }
    if any(graph.doubling for _, graph in rows):
        meanings |= {
            "Edges off by": "features were raised one by one with all held as the graph has it; the largest difference "
            "between an edge and what came out, over the largest edge. More than rounding, about 1e−5, is an error of "
            "the arithmetic. Edges of SAEs are estimates, and are not checked so.",
            "Correlation": "of edges with what happened when features were doubled and nothing was held: how well the "
            "picture drawn on this prompt foretells the model.",
        }
    return Terms(tuple(meanings.items()))


def _answer(labels: Sequence[str]) -> str:
    return _one_line(labels[0]) + (f" and {len(labels) - 1} more" if labels[1:] else "")


def _span(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Return the smallest and the largest value in words, once if they are equal."""
    return " to ".join(dict.fromkeys(written(value) for value in (min(values), max(values))))


def _one_line(text: str) -> str:
    """Return a text on one line, spaces at its ends left out."""
    return visible(text).strip() or "␣"

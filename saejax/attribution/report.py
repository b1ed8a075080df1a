"""The report on attribution graphs: what was traced, how much of it features explain, and whether the edges hold."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saejax.attribution.results import AttributeResults, DoublingResults, GraphResults, GraphTarget
from saejax.page.blocks import Block, Links, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number, percent, significant, visible


@dataclasses.dataclass(frozen=True)
class ReportedGraph:
    """A graph that the report shows."""

    number: int  #: its place in the report, from 1
    folder: Path  #: of the unit that made it
    slug: str  #: its name there
    title: str  #: of its table, with the set that it was made with
    kind: str  #: "transcoders" or "SAEs"
    results: GraphResults  #: what the stage ``attribute`` says of it

    @property
    def name(self) -> str:
        """Its name on the page: of several units two may have the same slug."""
        return f"{self.number}: {self.slug}"

    @property
    def doubling(self) -> DoublingResults:
        """The results of doubling features; those of no feature where it was not requested."""
        return self.results.doubling or DoublingResults(0, None, None)


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section with tables of all graphs, and links to their pages; none if there are none."""
    graphs = _traced(findings)
    if not graphs:
        return []
    kinds = sorted({graph.kind for graph in graphs}, reverse=True)
    several = "Graphs were" if len(graphs) > 1 else "The graph was"
    stays = {
        "transcoders": " while attention and norms stay as they were",
        "SAEs": f", {'with SAEs ' if len(kinds) > 1 else ''}as gradients estimate it",
    }
    intro = (
        "An attribution graph says, of one prompt, what made what: an edge's weight is what its source (a token, a "
        f"feature, or what the {' or '.join(kinds)} miss: an error) adds to its target (a feature or a logit)"
        f"{''.join(stays[kind] for kind in kinds)}. {several} pruned to the nodes and edges with the most influence on "
        "the answer."
    )
    names = [f"{graph.name}: {_one_line(graph.results.prompt)}" for graph in graphs]
    addresses = [findings.address(graph.folder / f"{graph.slug}.html") for graph in graphs]
    blocks: list[Block] = [Text(intro), *_tables(graphs), _meaning(graphs), *_curves(graphs)]
    blocks.append(
        Links("Interactive pages of the graphs, and their prompts", tuple(zip(names, addresses, strict=True)))
    )
    return [Section("Attribution graphs", tuple(blocks), lead=_lead(graphs, kinds))]


def _traced(findings: Findings) -> list[ReportedGraph]:
    graphs: list[ReportedGraph] = []
    for unit, results in findings.each(AttributeResults).items():
        kind, named = ("SAEs", results.dictionaries) if results.dictionaries else ("transcoders", [results.transcoders])
        title = f"Graphs with the {kind} {', '.join(named)}"
        for slug, graph in results.graphs.items():
            folder = findings.folders[f"attribute/{unit}"]
            graphs.append(ReportedGraph(len(graphs) + 1, folder, slug, title, kind, graph))
    return graphs


def _lead(graphs: Sequence[ReportedGraph], kinds: Sequence[str]) -> str:
    """Return a paragraph on all graphs for the beginning of the report."""
    prompts = "One prompt was" if len(graphs) == 1 else f"{len(graphs)} prompts were"
    explained = _span([graph.results.scores.replacement for graph in graphs], percent)
    paragraph = (
        f"{prompts} traced into attribution graphs, which say what in all layers made the answer. Of the influence on "
        f"it {explained} comes from the prompt's tokens through features; the rest starts at what the "
        f"{' or '.join(kinds)} do not explain."
    )
    if correlations := [graph.doubling.correlation for graph in graphs if graph.doubling.correlation is not None]:
        paragraph += (
            f" What the edges foretell has a correlation of {_span(correlations, number)} with what happens when "
            "features are doubled."
        )
    return paragraph


def _tables(graphs: Sequence[ReportedGraph]) -> list[Table]:
    """Return a table for each set of transcoders or SAEs."""
    columns: dict[str, Callable[[ReportedGraph], str]] = {
        "Graph": lambda graph: graph.name,
        "Answer": lambda graph: _answer(graph.results.targets),
        "Active features": lambda graph: f"{graph.results.active:,}",
        "Traced": lambda graph: (
            f"{graph.results.traced:,} ({percent(graph.results.traced / max(graph.results.active, 1))})"
        ),
        "Features kept": lambda graph: f"{graph.results.features:,}",
        "Errors kept": lambda graph: f"{graph.results.errors:,}",
        "Edges": lambda graph: f"{graph.results.edges:,}",
        "Replacement": lambda graph: number(graph.results.scores.replacement),
        "Completeness": lambda graph: number(graph.results.scores.completeness),
        "Untraced input": lambda graph: percent(graph.results.untraced, 1),
        "Edges off by": lambda graph: significant(graph.doubling.held_error, 2),
        "Correlation": lambda graph: number(graph.doubling.correlation),
    }
    return [
        Table.of(title, [(graph,) for graph in graphs if graph.title == title], columns, ["Answer"], stack=False)
        for title in dict.fromkeys(graph.title for graph in graphs)
    ]


def _curves(graphs: Sequence[ReportedGraph]) -> list[Table]:
    """Return a table of graphs whose parts were run alone; none where no graph's were, or no value is finite."""
    rows = []
    for graph in graphs:
        curve = graph.results.circuits
        if curve and any(value is not None and np.isfinite(value) for value in curve.faithfulness):
            fields = curve.share, curve.features, curve.errors, curve.faithfulness, curve.incompleteness
            for share, features, errors, faithful, incomplete in zip(*fields, strict=True):
                counts = percent(share), f"{features:,}", f"{errors:,}"
                rows.append((graph.name, *counts, number(faithful), number(incomplete)))
    columns = ("Graph", "Influence kept", "Features", "Errors", "Faithfulness", "Incompleteness")
    note = (
        "The model was run with the kept features and errors alone. Faithfulness is the first target in that run: "
        "1 is the whole model and 0 the model without any feature and error. Incompleteness is the same of all that "
        "was not kept: 0 if the kept part does all the work."
    )
    return [Table("Parts of the graphs run alone", columns, tuple(rows), note=note)] if rows else []


def _meaning(graphs: Sequence[ReportedGraph]) -> Terms:
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
    if any(graph.results.doubling for graph in graphs):
        meanings |= {
            "Edges off by": "features were raised one by one with all held as the graph has it; the largest difference "
            "between an edge and what came out, over the largest edge. More than rounding, about 1e−5, is an error of "
            "the arithmetic. Edges of SAEs are estimates, and are not checked so.",
            "Correlation": "of edges with what happened when features were doubled and nothing was held: how well the "
            "picture drawn on this prompt foretells the model.",
        }
    return Terms(tuple(meanings.items()))


def _answer(targets: Sequence[GraphTarget]) -> str:
    return _one_line(targets[0].label) + (f" and {len(targets) - 1} more" if targets[1:] else "")


def _span(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Return the smallest and the largest value in words, once if they are equal."""
    return " to ".join(dict.fromkeys(written(value) for value in (min(values), max(values))))


def _one_line(text: str) -> str:
    """Return a text on one line, spaces at its ends left out."""
    return visible(text).strip() or "␣"

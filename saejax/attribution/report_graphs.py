"""The graphs that the report shows, in tables: what was traced, how much of it is explained, and whether edges hold."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saejax.attribution.results import CurveResults, GraphResults
from saejax.page.blocks import Terms
from saejax.page.tables import Table, number, percent, significant, visible


@dataclasses.dataclass(frozen=True)
class ReportedGraph:
    """A graph that the report shows.

    Attributes:
      number: its place in the report, from 1.
      folder: of the unit that made it.
      slug: its name there.
      dictionaries: the set of transcoders that it was made with, or the folders of SAEs.
      saes: whether it is of SAEs.
      results: what the stage ``attribute`` says of it.
    """

    number: int
    folder: Path
    slug: str
    dictionaries: str
    saes: bool
    results: GraphResults

    @property
    def name(self) -> str:
        """Its name on the page: of several units two may have the same slug."""
        return f"Graph {self.number}: {self.slug}"

    @property
    def curve(self) -> CurveResults | None:
        """Faithfulness curves; None if they were not measured, or no value is finite."""
        curve = self.results.circuits
        return curve if curve and any(map(is_finite, curve.faithfulness)) else None

    @property
    def correlation(self) -> float | None:
        """Correlation of edges with the effects of doubling features, nothing frozen; None: not known."""
        return self.results.doubling.free.pearson if self.results.doubling else None


def missed(graphs: Sequence[ReportedGraph]) -> str:
    """Return the kind of dictionaries of the graphs: "transcoders", "SAEs" or both."""
    kinds = {"SAEs" if graph.saes else "transcoders" for graph in graphs}
    return " or ".join(sorted(kinds, reverse=True))


def tables(graphs: Sequence[ReportedGraph]) -> list[Table]:
    """Return a table for each set of transcoders or SAEs."""
    columns = (
        "Graph", "Answer", "Active features", "Traced", "Features kept", "Errors kept", "Edges", "Replacement",
        "Completeness", "Untraced input", "Edges off by", "Correlation",
    )  # fmt: skip
    sets = list(dict.fromkeys((graph.dictionaries, graph.saes) for graph in graphs))
    names = [name for name, _ in sets]
    return [
        Table(
            f"Graphs with the {'SAEs' if saes else 'transcoders'} {_short(name, names)}",
            columns,
            tuple(_row(graph) for graph in graphs if (graph.dictionaries, graph.saes) == (name, saes)),
            frozenset({1}),
            stack=False,
        )
        for name, saes in sets
    ]


def curves(graphs: Sequence[ReportedGraph]) -> list[Table]:
    """Return a table of graphs whose parts were run alone; none where no graph's were."""
    shown = [(graph, graph.curve) for graph in graphs]
    rows = [
        (
            f"{graph.number}: {graph.slug}", percent(share), f"{features:,}", f"{errors:,}", number(faithful),
            number(incomplete),
        )
        for graph, curve in shown
        if curve
        for share, features, errors, faithful, incomplete in zip(
            curve.share, curve.features, curve.errors, curve.faithfulness, curve.incompleteness, strict=True
        )
    ]  # fmt: skip
    columns = ("Graph", "Influence kept", "Features", "Errors", "Faithfulness", "Incompleteness")
    note = (
        "The model was run with the kept features and errors alone. Faithfulness is the first target in that run: "
        "1 is the whole model and 0 the model without any feature and error. Incompleteness is the same of all that "
        "was not kept: 0 if the kept part does all the work."
    )
    return [Table("Parts of the graphs run alone", columns, tuple(rows), note=note)] if rows else []


def _short(name: str, names: Sequence[str]) -> str:
    """Return the last two parts of each path, which all of a hub id are, unless others have the same."""
    short = [", ".join("/".join(Path(part).parts[-2:]) for part in other.split(",")) for other in names]
    return short[names.index(name)] if len(set(short)) == len(short) else name


def _row(graph: ReportedGraph) -> tuple[str, ...]:
    results, doubling = graph.results, graph.results.doubling
    labels = [one_line(target.label) for target in results.targets]
    return (
        f"{graph.number}: {graph.slug}",
        labels[0] + (f" and {len(labels) - 1} more" if labels[1:] else ""),
        f"{results.active:,}",
        f"{results.traced:,} ({percent(results.traced / max(results.active, 1))})",
        *(f"{count:,}" for count in (results.features, results.errors, results.edges)),
        number(results.scores.replacement),
        number(results.scores.completeness),
        percent(results.untraced, 1),
        significant(doubling.held_error if doubling else None, 2),
        number(graph.correlation),
    )


def meaning(graphs: Sequence[ReportedGraph]) -> Terms:
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


def is_finite(value: float | None) -> bool:
    """Return whether a value exists and is finite."""
    return value is not None and bool(np.isfinite(value))


def span(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Return the smallest and the largest value in words, once if they are equal."""
    return " to ".join(dict.fromkeys(written(value) for value in (min(values), max(values))))


def one_line(text: str) -> str:
    """Return a text on one line, spaces at its ends left out."""
    return visible(text).strip() or "␣"

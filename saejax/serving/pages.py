"""The server's pages: the list, a graph with what can be done to it, two graphs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from saejax.attribution.forms.difference import GraphDifference
from saejax.attribution.forms.document import GraphDocument
from saejax.attribution.forms.page import VIEWER
from saejax.attribution.results import GraphResults
from saejax.files import read_json
from saejax.page.blocks import Terms, Text
from saejax.page.document import Section, to_html
from saejax.page.scripts import interactive
from saejax.page.tables import MISSING, Table, number, percent
from saejax.results import from_json
from saejax.serving.shelf import ShelvedGraph
from saejax.settings import GraphConfig

_OWN = Path(__file__).parent / "viewer"
_MOST_ROWS = 200  # features of a comparison that are shown


def address(graph: str, **asked: Any) -> str:
    """Where a graph's page is, beside the list."""
    return f"graph?{urlencode(dict(id=graph, **asked))}"


def list_page(root: Path, graphs: Sequence[ShelvedGraph], config: GraphConfig, note: str, why: str) -> str:
    """The list of graphs, with the form that traces one.

    Args:
      root: the folder.
      graphs: in their order.
      config: whose settings the form begins with.
      note: what traces.
      why: nothing can be traced; "": it can.
    """
    listed = [
        dict(id=graph.id, address=address(graph.id), prompt=str(graph.entry.get("prompt", "")), about=_about(graph))
        for graph in graphs
    ]
    scripts = [*(VIEWER / f"{name}.js" for name in ("elements", "stream")), _OWN / "index.js"]
    return interactive(
        _OWN,
        "index",
        [path.read_text("utf-8") for path in scripts],
        dict(graphs=listed),
        style=(VIEWER / "graph.css").read_text("utf-8"),
        title=f"Attribution graphs of {root.resolve().name}",
        about=f"{len(graphs)} graph{'s' * (len(graphs) != 1)} in {root}",
        note=why or note,
        why=why,
        max_features=config.max_features,
        nodes=config.node_threshold,
        edges=config.edge_threshold,
    )


def _about(graph: ShelvedGraph) -> str:
    parts = [f"model {graph.entry['scan']}"] if graph.entry.get("scan") else []
    parts += [f"{len(graph.entry['prompt_tokens'])} tokens"] if graph.entry.get("prompt_tokens") else []
    results = graph.unit / f"{graph.path.stem}.json" if graph.unit else None
    if results and results.exists():
        found = from_json(GraphResults, read_json(results), results)
        parts += [f"{found.features:,} features", f"{found.edges:,} edges"]
        parts.append(f"replacement {number(found.scores.replacement)}")
    return ", ".join(parts)


def comparison_page(pair: Sequence[tuple[ShelvedGraph, GraphDocument]], found: GraphDifference) -> str:
    """Two graphs side by side.

    Args:
      pair: both, with their documents.
      found: what ``compare_graphs`` says of them.
    """
    first, second = (graph.id for graph, _ in pair)
    prompts = [(f"{place}: {graph.id}", document["metadata"]["prompt"]) for place, (graph, document) in zip("AB", pair)]
    told = [
        ("Features", f"{found.features[0]:,} in A, {found.features[1]:,} in B, {found.shared:,} in both."),
        ("In both, of all", f"{_share(found.jaccard)}; with B a position off {_share(found.shifted)}."),
        ("At any position", f"of the features of A {found.elsewhere:,} are in B."),
        ("Edges", f"{found.edges:,} between nodes of both; correlation of their weights {number(found.correlation)}."),
    ]
    outputs = tuple((text, _share(a), _share(b)) for text, a, b in found.outputs)
    rows = tuple(
        (one.ids[0] or MISSING, one.ids[1] or MISSING, *map(number, one.activations), *map(_share, one.shares))
        for one in found.found[:_MOST_ROWS]
    )
    columns = ("Node in A", "in B", "Activation in A", "in B", "Influence up to A", "up to B")
    aligned = "Positions are aligned from the end of both prompts. "
    more = f"The first {_MOST_ROWS} of {len(found.found):,}. " if len(found.found) > _MOST_ROWS else ""
    shares = "Influence up to a feature: the share that it and all more influential nodes have; small ones matter most."
    sections = [
        Section("What they share", (Terms(tuple(told)),)),
        Section(
            "Outputs",
            (
                Table(
                    "Probabilities; a difference of two logits has 100 %",
                    ("Output", "A", "B"),
                    outputs,
                    frozenset({1, 2}),
                    stack=False,
                ),
            ),
        ),
        Section(
            "Features",
            (
                Text(f"{more}Those whose influence differs most come first. {aligned}{shares}"),
                Table("Features", columns, rows, frozenset({2, 3, 4, 5}), stack=False),
            ),
        ),
    ]
    return to_html(f"{first} beside {second}", [f"{name}: {prompt}" for name, prompt in prompts], sections, "")


def _share(share: float | None) -> str:
    return percent(share, 1)

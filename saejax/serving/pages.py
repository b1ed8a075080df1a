"""The server's pages: the list, a graph with what can be done to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from saejax.attribution.forms.page import VIEWER
from saejax.attribution.results import GraphResults
from saejax.errors import UserError
from saejax.files import read_json
from saejax.page.scripts import interactive
from saejax.page.tables import number, percent
from saejax.results import from_json
from saejax.serving.store import GraphStore, StoredGraph
from saejax.settings import GraphConfig

_OWN = Path(__file__).parent / "viewer"


def address(graph: str, **query: Any) -> str:
    """Return the address of a graph's page, relative to the list of graphs."""
    return f"graph?{urlencode(dict(id=graph, **query))}"


def list_page(store: GraphStore, graphs: Sequence[StoredGraph], config: GraphConfig, note: str, why: str) -> str:
    """Return the list of graphs, with the form that traces one.

    Args:
      store: of the folder; its problems are listed, too.
      graphs: in their order.
      config: whose settings the form begins with.
      note: what traces.
      why: nothing can be traced; "": it can.
    """
    root, problems = store.root, dict(store.problems)
    listed = [
        dict(
            id=graph.id,
            address=address(graph.id),
            prompt=str(graph.entry.get("prompt", "")),
            about=_about(graph, problems),
        )
        for graph in graphs
    ]
    scripts = [*(VIEWER / f"{name}.js" for name in ("elements", "stream")), _OWN / "index.js"]
    return interactive(
        _OWN,
        "index",
        [path.read_text("utf-8") for path in scripts],
        dict(graphs=listed, problems=[f"{path}: {problem}" for path, problem in problems.items()]),
        style=(VIEWER / "graph.css").read_text("utf-8"),
        title=f"Attribution graphs of {root.resolve().name}",
        about=f"{len(graphs)} graph{'s' * (len(graphs) != 1)} in {root}",
        note=why or note,
        why=why,
        max_features=config.max_features,
        nodes=config.node_threshold,
        edges=config.edge_threshold,
    )


def _about(graph: StoredGraph, problems: dict[str, str]) -> str:
    """Return a line about a graph; results that cannot be read are added to ``problems``."""
    parts = [f"model {graph.entry['scan']}"] if graph.entry.get("scan") else []
    parts += [f"{len(graph.entry['prompt_tokens'])} tokens"] if graph.entry.get("prompt_tokens") else []
    results = graph.unit / f"{graph.path.stem}.json" if graph.unit else None
    if results and results.exists():
        try:
            graph_results = from_json(GraphResults, read_json(results), results)
        except UserError as error:
            problems[graph.id] = " ".join(str(error).split())
        else:
            parts += [f"{graph_results.features:,} features", f"{graph_results.edges:,} edges"]
            share = percent(graph_results.traced / max(graph_results.active, 1))
            parts.append(
                f"replacement {number(graph_results.scores.replacement)} with {share} of active features traced"
            )
    return ", ".join(parts)

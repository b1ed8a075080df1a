"""An interactive page of an attribution graph: one HTML file, complete in itself, that loads nothing from anywhere.

It shows layers by positions, and for the node that is selected what feeds it and what it feeds. ``viewer`` holds its
template, style and scripts; the scripts are written into the page in the order of ``_SCRIPTS`` and share one scope.
What they read is the document that Neuronpedia reads, so any graph in that format can be shown, ours or not.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.forms.document import DocumentMetadata, GraphDocument, check_document
from saejax.attribution.forms.packed import packed_edges
from saejax.files import write_text
from saejax.page.scripts import interactive
from saejax.page.tables import percent

VIEWER = Path(__file__).parent / "viewer"
_SCRIPTS = [
    *("model", "state", "layout", "paint", "draw", "elements", "panel", "tip", "search", "units", "pins", "subgraph"),
    *("tables", "app", "main"),
]
_LIVE = ["stream", "effects", "live"]  # scripts where a server answers
_DATA = re.compile(r'<script type="application/json" id="graph-data">(.*?)</script>', re.DOTALL)
Feature = tuple[int, int]  # layer, number of the feature


@dataclasses.dataclass(frozen=True)
class PageTable:
    """A table on the page.

    Attributes:
      title: one line.
      columns: their headings.
      rows: their cells, numbers or texts; a text that is the id of a node becomes a button that selects it.
      note: a sentence or two above the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]
    note: str = ""


def write_page(path: Path, document: GraphDocument, **shown: Any) -> None:
    """Writes the page of a graph, whole or not at all; its arguments are those of ``page_html``."""
    write_text(Path(path), page_html(document, **shown))


def page_html(
    document: GraphDocument,
    *,
    labels: Mapping[Feature, str] | None = None,
    examples: Mapping[Feature, Sequence[Any]] | None = None,
    heads: Mapping[tuple[str, str], Sequence[tuple[int, int, float]]] | None = None,
    tables: Sequence[PageTable] = (),
    live: Mapping[str, Any] | None = None,
) -> str:
    """The page of a graph.

    Args:
      document: the graph in Neuronpedia's format: metadata, qParams, nodes, links.
      labels: what features are called; goes before the document's own ``clerp``.
      examples: the contexts in which features fire most strongly, strongest first. Each has ``tokens`` and
        ``activations``, as attributes or as keys; an activation that is not known is NaN or None.
      heads: (id of the source, id of the target) -> the attention heads that carry the edge, the strongest first:
        (layer, head, part of the weight that vanishes without it).
      tables: shown below the graph, such as query-key scores split over pairs of nodes.
      live: what the page must know of the server that gives it, as ``serving.app`` says it; None: it stands alone.

    Raises:
      UserError: the document is not a graph: keys are missing, ids are not unique, links lead nowhere.
    """
    check_document(document)
    data = {
        "document": {key: value for key, value in document.items() if key != "links"},
        "edges": packed_edges(document),
        "labels": {_key(feature): label for feature, label in (labels or {}).items()},
        "examples": {_key(feature): [_example(one) for one in some] for feature, some in (examples or {}).items()},
        "heads": {f"{source} {target}": list(carried) for (source, target), carried in (heads or {}).items()},
        "tables": [dataclasses.asdict(table) for table in tables],
        "live": live,
    }
    metadata = document["metadata"]
    heading = metadata["prompt"] or metadata["slug"]
    names = [*_LIVE, *_SCRIPTS] if live else _SCRIPTS
    return interactive(
        VIEWER,
        "graph",
        [(VIEWER / f"{name}.js").read_text(encoding="utf-8") for name in names],
        data,
        title=f"Attribution graph: {heading}",
        heading=heading,
        about=_about(metadata),
        tables=bool(tables),
        live=bool(live),
    )


def read_shown(path: Path) -> dict[str, Any]:
    """What a page that ``write_page`` wrote shows beside its document, as ``page_html`` takes it; {} if there is none.

    A page is the only file that has its tables and, of edges, the heads that it names.
    """
    found = _DATA.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not found:
        return {}
    data = json.loads(found[1])
    heads = {tuple(key.split(" ")): carried for key, carried in data["heads"].items()}
    return dict(heads=heads, tables=[PageTable(**table) for table in data["tables"]])


def _about(metadata: DocumentMetadata) -> str:
    """One line below the heading: the model, the graph's name, its scores, and what was kept."""
    parts = [f"Attribution graph {metadata['slug']}", f"model {metadata['scan']}"]
    for name in ("replacement_score", "completeness_score"):
        if isinstance(metadata.get(name), int | float):
            parts.append(f"{name.replace('_', ' ')} {metadata[name]:.2f}")
    settings = metadata.get("pruning_settings") or {}
    kept = settings.get("node_threshold", metadata.get("node_threshold"))
    if isinstance(kept, int | float):
        parts.append(f"pruned to {percent(kept)} of the influence of nodes")
    if isinstance(settings.get("edge_threshold"), int | float):
        parts.append(f"{percent(settings['edge_threshold'])} of that of edges")
    return ", ".join(parts) + "."


def _example(example: Any) -> dict[str, list]:
    tokens, values = (
        (example["tokens"], example["activations"])
        if isinstance(example, Mapping)
        else (example.tokens, example.activations)
    )
    known = [None if value is None or not math.isfinite(value) else float(value) for value in values]
    return {"tokens": list(tokens), "activations": known}


def _key(feature: Feature) -> str:
    return f"{feature[0]}_{feature[1]}"

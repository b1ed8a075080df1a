"""An interactive page of an attribution graph: one HTML file, complete in itself, that loads nothing from anywhere.

It shows layers by positions, and the inputs and outputs of the selected node. ``viewer`` holds its
template, style and scripts; the scripts are written into the page in the order of ``_SCRIPTS`` and share one scope.
What they read is the document that Neuronpedia reads, so any graph in that format can be shown, ours or not.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import quote

from saejax.attribution.forms.document import (
    GraphDocument,
    check_document,
    describe_sources,
    feature_nodes,
    feature_of,
)
from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.forms.neuronpedia import pin_as_saved, to_document
from saejax.attribution.graph import Graph
from saejax.files import write_text
from saejax.page.scripts import interactive, visible_script
from saejax.page.tables import percent

VIEWER = Path(__file__).parent / "viewer"
_SCRIPTS = [
    *("model", "state", "layout", "paint", "draw", "elements", "panel", "tip", "search", "units", "pins", "subgraph"),
    *("tables", "app", "main"),
]
FULL = 300  # features, the most influential ones, whose contexts a page has; of the others it has names
_UNNAMED = "graph"  # the name of a graph that has none, which is not said: "Attribution graph graph"
_LIVE = ["stream", "effects", "live"]  # scripts where a server answers


@dataclasses.dataclass(frozen=True)
class PageTable:
    """A table on the page."""

    title: str  #: one line
    columns: Sequence[str]  #: their headings
    #: their cells, numbers or texts; a text that is the id of a node becomes a button that selects it.
    rows: Sequence[Sequence[str | float]]
    note: str = ""  #: a sentence or two above the table


def write_page(path: Path, document: GraphDocument, **shown: Any) -> None:
    """Write the page of a graph, whole or not at all; it takes the arguments of ``page_html``."""
    write_text(Path(path), page_html(document, **shown))


def graph_page(
    graph: Graph,
    labels: Mapping[Feature, str] | None = None,
    details: Mapping[Feature, FeatureDetails] | None = None,
    state: Mapping[str, Any] | None = None,
) -> str:
    """Return the page of a pruned graph.

    Args:
      graph: the pruned graph.
      labels: labels of its features.
      details: contexts, logits and labels of features; see ``page_html``.
      state: groups, pins and their places, as ``document.read_state`` gives them.
    """
    document = to_document(graph, _UNNAMED, labels=labels, **pin_as_saved(graph, state or {}))
    return page_html(document, details=details)


def page_html(
    document: GraphDocument,
    *,
    labels: Mapping[Feature, str] | None = None,
    details: Mapping[Feature, FeatureDetails] | None = None,
    tables: Sequence[PageTable] = (),
    live: Mapping[str, Any] | None = None,
    note: str = "",
) -> str:
    """Return the page of a graph.

    Args:
      document: the graph in Neuronpedia's format: metadata, qParams, nodes, links.
      labels: labels of features; they replace the document's ``clerp``, which replaces the names in ``details``.
      details: contexts, logits and labels of features; of all but ``FULL`` the page has the name alone.
      tables: shown below the graph, such as query-key scores split over pairs of nodes.
      live: state of the server for the page's controls, from ``serving.app``; None: the page stands alone.
      note: a sentence above the graph, behind what it is.

    Raises:
      UserError: the document is not a graph: keys are missing, ids are not unique, links lead nowhere.
    """
    document, details = check_document(document), details or {}
    # A server tells the contexts of a feature when its node is opened.
    full = set() if live else set(kept_features(document)[:FULL])
    data = {
        "document": {key: value for key, value in document.items() if key != "links"},
        "edges": page_edges(document),
        "labels": {_key(feature): label for feature, label in (labels or {}).items()},
        "details": {
            _key(feature): feature_data(value) if feature in full else dict(name=value.name)
            for feature, value in details.items()
        },
        "source": _source(document["metadata"]),
        "tables": [dataclasses.asdict(table) for table in tables],
        "live": live,
    }
    metadata = document["metadata"]
    heading = metadata["prompt"] or _name(metadata)
    names = [*_LIVE, *_SCRIPTS] if live else _SCRIPTS
    write = functools.partial(
        interactive,
        VIEWER,
        "graph",
        [visible_script(), *((VIEWER / f"{name}.js").read_text(encoding="utf-8") for name in names)],
        title=": ".join(filter(None, ["Attribution graph", heading])),
        heading=heading or "Attribution graph",
        about=f"{_about(metadata)} {note}".strip(),
        tables=bool(tables),
        live=bool(live),
    )
    try:
        return write(data)
    except ValueError:  # another program wrote NaN, which is no JSON, into a key that is not ours
        return write(json.loads(json.dumps(data), parse_constant=lambda name: None))


def kept_features(document: GraphDocument) -> list[Feature]:
    """Return the features of a graph, the most influential first."""
    nodes = feature_nodes(document)
    # Shares are cumulative: the most influential node has the smallest.
    nodes.sort(key=lambda node: (node.get("influence") is None, node.get("influence") or 0.0))
    return list(dict.fromkeys(map(feature_of, nodes)))


def feature_data(details: FeatureDetails) -> dict[str, Any]:
    """Return the details of a feature as the page's scripts take them."""
    return dataclasses.asdict(details) | dict(name=details.name)


def page_edges(document: GraphDocument) -> dict[str, list[Any]]:
    """Return the links as columns, so that the page parses no names.

    Returns:
      ``source`` and ``target``, indices of nodes, and ``weight``; and ``more``, the other keys of each link, where a
      link has any: the page saves them again.
    """
    links, place = document["links"], {node["node_id"]: i for i, node in enumerate(document["nodes"])}
    columns: dict[str, list[Any]] = {end: [place[link[end]] for link in links] for end in ("source", "target")}
    columns["weight"] = [link["weight"] for link in links]
    more = [{key: value for key, value in link.items() if key not in ("source", "target", "weight")} for link in links]
    return columns | (dict(more=more) if any(more) else {})


def _source(metadata: Mapping[str, Any]) -> str:
    """Return the address of features at Neuronpedia, with {layer} and {index} in it; "": the set is not there."""
    source_set = (metadata.get("feature_details") or {}).get("neuronpedia_source_set")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", str(source_set or "")) or "/" in metadata["scan"]:
        return ""
    return f"https://www.neuronpedia.org/{quote(metadata['scan'], errors='replace')}/{{layer}}-{source_set}/{{index}}"


def _about(metadata: Mapping[str, Any]) -> str:
    """Return the line below the heading: the graph's name, the model, the scores, and the shares that were kept."""
    parts = [f"Attribution graph {_name(metadata)}".strip(), *describe_sources(metadata)]
    scores = {name: metadata.get(name) for name in ("replacement_score", "completeness_score")}
    scores = {name: score for name, score in scores.items() if _is_number(score)}
    parts += [f"{name.replace('_', ' ')} {score:.2f}" for name, score in scores.items()]
    generation = metadata.get("generation_settings") or {}
    active, traced = generation.get("active_features"), generation.get("traced_features")
    if _is_number(active) and _is_number(traced) and active > 0:
        # Both numbers, as a share of nearly all would look like all.
        parts.append(f"with {traced:,} of {active:,} active features traced ({percent(traced / active)})")
    elif scores:
        parts.append("the share of active features that was traced is not stated")
    if isinstance(generation.get("edges"), str):
        parts.append(f"edges are {generation['edges']}")
    settings = metadata.get("pruning_settings") or {}
    kept = settings.get("node_threshold", metadata.get("node_threshold"))
    if _is_number(kept):
        parts.append(f"pruned to {100 * kept:.4g}\u00a0% of the influence of nodes")
    if _is_number(settings.get("edge_threshold")):
        parts.append(f"{100 * settings['edge_threshold']:.4g}\u00a0% of the influence of edges")
    return ", ".join(parts) + "."


def _name(metadata: Mapping[str, Any]) -> str:
    """Return the graph's name; "": it was given none."""
    return "" if metadata["slug"] == _UNNAMED else metadata["slug"]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _key(feature: Feature) -> str:
    return f"{feature[0]}_{feature[1]}"

"""A figure of a graph for print: its most influential nodes as labelled boxes, layers by positions, strongest edges.

Only layers and positions where something stands take room. Sizes are in inches, so that text of 6.5 points stays of
6.5 points. Excitatory edges are blue and whole, inhibitory ones orange and broken: they differ in grey, too.
"""

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

from saejax.attribution.forms.document import GraphDocument, check_document
from saejax.attribution.forms.figure_layout import GAP, GUTTER, SIZE, Box, fitted, text_width
from saejax.attribution.forms.scores import strongest
from saejax.errors import UserError
from saejax.files import whole_file

INK, SOFT, LINE, CARD, PAPER, BLUE, ORANGE = "#1b1f24", "#555e68", "#d4d9df", "#f5f7f9", "#ffffff", "#0072b2", "#d55e00"
_STYLE = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "saejax", "text.parse_math": False}


def draw_graph(
    document: GraphDocument,
    *,
    max_nodes: int = 50,
    max_edges: int = 150,
) -> Figure:
    """Draw a graph in Neuronpedia's format.

    Args:
      document: metadata, qParams, nodes, links.
      max_nodes: how many features and errors are drawn at most, the most influential ones. Those without an edge to
        another of them are left out, and so are such tokens; outputs are always drawn.
      max_edges: how many edges between them are drawn, those of the largest score (``scores``); besides, the
        strongest input and the strongest output of every node, so that each has its place in the circuit.

    Raises:
      UserError: the document is not a graph, or nothing is asked for.
    """
    check_document(document)
    if max_nodes < 1 or max_edges < 1:
        raise UserError(f"a figure of {max_nodes} nodes and {max_edges} edges is empty: ask for at least 1 of each")
    nodes, links = _chosen(document, max_nodes, max_edges)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        boxes, rows, (width, height) = fitted(nodes, document)
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        for name, y, above in rows:
            axes.plot([GUTTER, width], [above, above], color=LINE, linewidth=0.4, zorder=0)
            axes.text(GUTTER - 0.08, y, name, size=SIZE, color=SOFT, ha="right", va="center")
        _draw_legend(axes)
        for place, link in reversed(list(enumerate(links))):  # the strongest last, above the others
            ends = boxes[link["source"]], boxes[link["target"]]
            axes.add_patch(_edge(*ends, link["weight"] >= 0, 1 - place / len(links)))
        for box in boxes.values():
            _draw_box(axes, box)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as .svg or .pdf, by the path's suffix, atomically and reproducibly to the byte."""
    kind = Path(path).suffix[1:]
    empty = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    if kind not in empty:
        raise UserError(f"{path}: a figure is written as .svg or .pdf")
    rendered = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure.savefig(rendered, format=kind, metadata=empty[kind])
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(rendered.getvalue())


def _chosen(document: GraphDocument, max_nodes: int, max_edges: int) -> tuple[list[Any], list[Any]]:
    """Return the nodes and edges that are drawn."""
    fixed = ("embedding", "logit")
    inner = [node for node in document["nodes"] if node["feature_type"] not in fixed]
    inner.sort(key=lambda node: (node.get("influence") is None, node.get("influence") or 0.0))
    kept = {node["node_id"] for node in inner[:max_nodes]}
    around = {node["node_id"] for node in document["nodes"] if node["feature_type"] in fixed}
    ordered = [document["links"][place] for place in strongest(document)]
    links = [link for link in ordered if {link["source"], link["target"]} <= kept | around]
    seen: set[tuple[str, str]] = set()
    wanted = []
    for k, link in enumerate(links):
        ends = {(end, link[end]) for end in ("source", "target") if link[end] in kept}
        if k < max_edges or ends - seen:
            wanted.append(link)
        seen |= ends
    ends = {link[end] for link in wanted for end in ("source", "target")}
    logits = {node["node_id"] for node in document["nodes"] if node["feature_type"] == "logit"}
    return [node for node in document["nodes"] if node["node_id"] in ends | logits], wanted


def _edge(source: Box, target: Box, excites: bool, strength: float) -> PathPatch:
    """Return an edge; ``strength``, by its rank, is above 0 and at most 1."""
    below, above = source.y + source.height / 2, target.y - target.height / 2
    bend = max(0.12, 0.45 * (above - below))
    points = [(source.x, below), (source.x, below + bend), (target.x, above - bend), (target.x, above)]
    return PathPatch(
        Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]), facecolor="none",
        edgecolor=BLUE if excites else ORANGE, linestyle="-" if excites else (0, (4, 1.5)),
        linewidth=0.4 + 2.2 * strength, alpha=0.35 + 0.55 * strength**0.5, zorder=1 + strength,
    )  # fmt: skip


def _draw_legend(axes: Any) -> None:
    x = GUTTER + GAP
    for name, color, style in (("excites", BLUE, "-"), ("inhibits", ORANGE, (0, (4, 1.5)))):
        axes.plot([x, x + 0.25], [0.09, 0.09], color=color, linestyle=style, linewidth=1.6)
        axes.text(x + 0.31, 0.09, name, size=SIZE, color=SOFT, va="center_baseline")
        x += 0.4 + text_width(name) + 0.15


def _draw_box(axes: Any, box: Box) -> None:
    kind = box.kind
    corner = box.x - box.width / 2, box.y - box.height / 2
    look = dict(facecolor=CARD, edgecolor=SOFT, linewidth=0.6, zorder=3)
    if kind == "token":
        look |= dict(facecolor=INK, edgecolor=INK)
    elif kind == "error":
        look |= dict(facecolor=PAPER, linestyle=(0, (2, 1)))
    elif kind == "output":
        look |= dict(facecolor=PAPER, edgecolor=INK, linewidth=1.1)
    if kind in ("token", "error"):
        axes.add_patch(Rectangle(corner, box.width, box.height, **look))
    else:
        style = "round,pad=0,rounding_size=0.05"
        axes.add_patch(FancyBboxPatch(corner, box.width, box.height, boxstyle=style, **look))
    color = PAPER if kind == "token" else INK
    axes.text(
        box.x, box.y, box.text, size=SIZE, color=color, ha="center", va="center", linespacing=1.1, zorder=4,
        parse_math=False, rotation=90 * box.upright,
    )  # fmt: skip

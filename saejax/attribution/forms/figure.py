"""A figure of a graph for print: its most influential nodes as labelled boxes, layers by positions, strongest edges.

A box is as large as its text, and stands as near to the column of its position as the others of its layer allow. Only
layers and positions where something stands take room. Sizes are in inches from the lower left corner, so that text of
6.5 points stays of 6.5 points. Excitatory edges are blue and whole, inhibitory ones orange and broken: they differ in
grey, too.
"""

import dataclasses
import functools
import io
import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

from saejax.attribution.forms.document import DocumentNode, GraphDocument, check_document, ranked_links
from saejax.files import write_text
from saejax.page.tables import visible

INK, SOFT, LINE, CARD, PAPER, BLUE, ORANGE = "#1b1f24", "#555e68", "#d4d9df", "#f5f7f9", "#ffffff", "#0072b2", "#d55e00"
SIZE = 6.5  # points, of all text
_STYLE = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "saejax", "text.parse_math": False}
_GAP, _GUTTER, _PAD = 0.05, 0.32, 0.045  # between boxes; for the names of layers; inside boxes
_WIDTH, _COLUMN = 7.2, 0.25  # of the figure, unless its columns, at least so wide, need more
_LETTERS, _LINES = 16, 2  # of a label; longer labels are cut
_NODES, _EDGES = 50, 150  # features and errors, and edges by their score, that are drawn
_KINDS = {"embedding": "token", "logit": "output", "mlp reconstruction error": "error"}
_DIFFERENCE = re.compile(r"""(['"])(.*)\1 - (['"])(.*)\3""", re.DOTALL)  # of logits, as ``targets`` names it


@dataclasses.dataclass
class Box:
    """A node: what it is, its text, its size, and where its middle is."""

    kind: str  # "token", "output", "error" or "feature"
    layer: int  # -1: tokens
    position: int
    text: str
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0


def draw_graph(document: GraphDocument) -> Figure:
    """Draw a graph in Neuronpedia's format.

    The most influential features and errors are drawn. Those without an edge to another of them are left out, and so
    are such tokens; outputs are always drawn. Of the edges between them, those of the largest score are drawn
    (``ranked_links``); besides, the strongest input and the strongest output of every node, so that each has its place
    in the circuit.

    Raises:
      UserError: the document is not a graph.
    """
    check_document(document)
    nodes, links = _choose(document)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        boxes = {node["node_id"]: _box(node, document) for node in nodes}
        rows, (width, height) = _place(list(boxes.values()))
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        for name, low, high in rows:
            axes.plot([_GUTTER, width], [high, high], color=LINE, linewidth=0.4, zorder=0)
            axes.text(_GUTTER - 0.08, (low + high) / 2, name, size=SIZE, color=SOFT, ha="right", va="center")
        _draw_legend(axes)
        for place, link in reversed(list(enumerate(links))):  # the strongest last, above the others
            ends = boxes[link["source"]], boxes[link["target"]]
            axes.add_patch(_edge(*ends, link["weight"] >= 0, 1 - place / len(links)))
        for box in boxes.values():
            _draw_box(axes, box)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as .svg, atomically and reproducibly to the byte."""
    text = io.StringIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    write_text(path, text.getvalue())


def visible_token(text: str) -> str:
    """Return a token with visible signs for spaces and line ends."""
    return visible(text).replace(" ", "␣") or "∅"


def _choose(document: GraphDocument) -> tuple[list[Any], list[Any]]:
    """Return the nodes and edges that are drawn."""
    fixed = ("embedding", "logit")
    inner = [node for node in document["nodes"] if node["feature_type"] not in fixed]
    inner.sort(key=lambda node: (node.get("influence") is None, node.get("influence") or 0.0))
    kept = {node["node_id"] for node in inner[:_NODES]}
    around = {node["node_id"] for node in document["nodes"] if node["feature_type"] in fixed}
    ordered = [document["links"][place] for place in ranked_links(document)[0]]
    links = [link for link in ordered if {link["source"], link["target"]} <= kept | around]
    seen: set[tuple[str, str]] = set()
    wanted = []
    for k, link in enumerate(links):
        ends = {(end, link[end]) for end in ("source", "target") if link[end] in kept}
        if k < _EDGES or ends - seen:
            wanted.append(link)
        seen |= ends
    ends = {link[end] for link in wanted for end in ("source", "target")}
    logits = {node["node_id"] for node in document["nodes"] if node["feature_type"] == "logit"}
    return [node for node in document["nodes"] if node["node_id"] in ends | logits], wanted


def _box(node: DocumentNode, document: GraphDocument) -> Box:
    kind, text = _KINDS.get(node["feature_type"], "feature"), "error"
    if kind == "token":
        token = visible_token(document["metadata"]["prompt_tokens"][node["ctx_idx"]])
        text = token if len(token) <= _LETTERS else f"{token[: _LETTERS - 1]}…"
    elif kind == "output":
        text = _output_text(node)
    elif kind == "feature":
        label = node["clerp"] or f"#{node['node_id'].split('_')[1]}"
        wrapped = textwrap.wrap(label, _LETTERS) or [label]
        text = "\n".join(wrapped[:_LINES]) + ("…" if len(wrapped) > _LINES else "")
    lines = text.split("\n")
    size = max(_text_width(line) for line in lines) + 2 * _PAD, len(lines) * SIZE * 1.25 / 72 + 1.2 * _PAD
    # Tokens are upright: so the columns of a prompt take the least room.
    width, height = (size[1], max(size[0], 0.2)) if kind == "token" else (max(size[0], 0.2), size[1])
    return Box(kind, -1 if kind == "token" else int(node["layer"]), node["ctx_idx"], text, width, height)


def _output_text(node: DocumentNode) -> str:
    """Return an output's token and its probability, or the two tokens of a difference of logits."""
    quoted = node["clerp"].removeprefix('Output "').rsplit('" (p=', 1)[0]
    if pair := _DIFFERENCE.fullmatch(quoted):
        return f"{visible_token(pair[2])} − {visible_token(pair[4])}"
    chance = node.get("token_prob") or 0.0
    return f"{visible_token(quoted)}\n{'<1' if 0 < chance < 0.01 else f'{100 * chance:.0f}'} %"


@functools.lru_cache(10_000)
def _text_width(text: str) -> float:
    """Return the width of one line in inches."""
    plain = text.replace("$", "\\$")  # a single dollar sign is none to TextPath
    return TextPath((0, 0), plain, size=SIZE, prop=FontProperties(family="DejaVu Sans")).get_extents().width / 72


def _place(boxes: Sequence[Box]) -> tuple[list[tuple[str, float, float]], tuple[float, float]]:
    """Place each box; return the rows, each a name, its lower and its upper edge, and the figure's width and height."""
    columns = sorted({box.position for box in boxes})
    width = max(_WIDTH, _GUTTER + _COLUMN * len(columns), *(box.width + _GUTTER + 2 * _GAP for box in boxes))
    step = (width - _GUTTER) / len(columns)
    for box in boxes:
        box.x = _GUTTER + (columns.index(box.position) + 0.5) * step
    # Outputs come last, above all layers.
    order = sorted(boxes, key=lambda box: (box.kind == "output", box.layer, box.position))
    rows, y = list[tuple[str, float, float]](), 0.24
    grouped = [list(group) for _, group in itertools.groupby(order, key=lambda box: (box.kind == "output", box.layer))]
    gap = min(0.3, 3.0 / len(grouped))
    for group in grouped:
        low, name = y, "out" if group[0].kind == "output" else str(group[0].layer) if group[0].layer >= 0 else "E"
        for line in _lines(group, width):
            tall = max(box.height for box in line)
            for box in line:
                box.y = y + (tall - box.height / 2 if box.layer < 0 else tall / 2)
            y += tall + _GAP
        rows.append((name, low, y + gap / 2))
        y += gap
    return rows, (width, y - gap + 0.02)


def _lines(group: list[Box], width: float) -> list[list[Box]]:
    """Place the boxes of a layer from left to right, in as many lines as they need; return the lines from below."""
    lines: list[list[Box]] = [[]]
    for box in group:
        if lines[-1] and sum(member.width + _GAP for member in (*lines[-1], box)) > width - _GUTTER - _GAP:
            lines.append([])
        lines[-1].append(box)
    for line in lines:
        right = _GUTTER
        for box in line:  # pushed to the right by those before them
            box.x = max(box.x, right + _GAP + box.width / 2)
            right = box.x + box.width / 2
        left = width
        for box in reversed(line):  # and back from the figure's edge
            box.x = min(box.x, left - _GAP - box.width / 2)
            left = box.x - box.width / 2
    return lines


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
    x = _GUTTER + _GAP
    for name, color, style in (("excites", BLUE, "-"), ("inhibits", ORANGE, (0, (4, 1.5)))):
        axes.plot([x, x + 0.25], [0.09, 0.09], color=color, linestyle=style, linewidth=1.6)
        axes.text(x + 0.31, 0.09, name, size=SIZE, color=SOFT, va="center_baseline")
        x += 0.4 + _text_width(name) + 0.15


def _draw_box(axes: Any, box: Box) -> None:
    corner = box.x - box.width / 2, box.y - box.height / 2
    looks: dict[str, dict[str, Any]] = {
        "token": dict(facecolor=INK, edgecolor=INK),
        "error": dict(facecolor=PAPER, linestyle=(0, (2, 1))),
        "output": dict(facecolor=PAPER, edgecolor=INK, linewidth=1.1),
    }
    look = dict(facecolor=CARD, edgecolor=SOFT, linewidth=0.6, zorder=3) | looks.get(box.kind, {})
    if box.kind in ("token", "error"):
        axes.add_patch(Rectangle(corner, box.width, box.height, **look))
    else:
        style = "round,pad=0,rounding_size=0.05"
        axes.add_patch(FancyBboxPatch(corner, box.width, box.height, boxstyle=style, **look))
    color = PAPER if box.kind == "token" else INK
    axes.text(
        box.x, box.y, box.text, size=SIZE, color=color, ha="center", va="center", linespacing=1.1, zorder=4,
        parse_math=False, rotation=90 * (box.kind == "token"),
    )  # fmt: skip

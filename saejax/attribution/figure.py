"""A figure of a graph for print: its most influential nodes as labelled boxes, layers by positions, strongest edges.

Only layers and positions where something stands take room. Sizes are in inches, so that text of 6.5 points stays of
6.5 points. Excitatory edges are blue and whole, inhibitory ones orange and broken: they differ in grey, too.
"""

import dataclasses
import functools
import io
import textwrap
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

from saejax.attribution.document import check_document
from saejax.errors import UserError
from saejax.workspace import whole_file

INK, SOFT, LINE, CARD, PAPER, BLUE, ORANGE = "#1b1f24", "#555e68", "#d4d9df", "#f5f7f9", "#ffffff", "#0072b2", "#d55e00"
_SIZE = 6.5  # points
_LABELS = ((16, 2), (12, 3), (9, 4))  # letters in a line, and lines of a label; longer labels are cut
_PAD, _GAP, _ROW_GAP, _GUTTER = 0.045, 0.05, 0.3, 0.32  # inches
_PAGE = 7.2, 10.0  # inches that a page has room for
_STYLE = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "saejax", "text.parse_math": False}


@dataclasses.dataclass
class _Box:
    """A node: its text, its size, and where its middle is."""

    node: Mapping[str, Any]
    text: str
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    upright: bool = False


def draw_graph(
    document: Mapping[str, Any],
    *,
    max_nodes: int = 50,
    max_edges: int = 150,
    labels: Mapping[tuple[int, int], str] | None = None,
) -> Figure:
    """Draws a graph in Neuronpedia's format.

    Args:
      document: metadata, qParams, nodes, links.
      max_nodes: how many features and errors are drawn at most, the most influential ones. Those without an edge to
        another of them are left out, and so are such tokens; outputs are always drawn.
      max_edges: how many edges between them are drawn, those of the largest |weight|; besides, the strongest input
        and the strongest output of every node, so that each has its place in the circuit.
      labels: (layer, feature) -> what the feature is called; goes before the document's ``clerp``.

    Raises:
      UserError: the document is not a graph, or nothing is asked for.
    """
    check_document(document)
    if max_nodes < 1 or max_edges < 1:
        raise UserError(f"a figure of {max_nodes} nodes and {max_edges} edges is empty: ask for at least 1 of each")
    nodes, links = _chosen(document, max_nodes, max_edges)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        width, height, rows, boxes = _fitted(nodes, document, labels or {})
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        for name, y, above in rows:
            axes.plot([_GUTTER, width], [above, above], color=LINE, linewidth=0.4, zorder=0)
            axes.text(_GUTTER - 0.08, y, name, size=_SIZE, color=SOFT, ha="right", va="center")
        _draw_legend(axes)
        most = max((abs(link["weight"]) for link in links), default=1.0) or 1.0
        for link in sorted(links, key=lambda link: abs(link["weight"])):
            axes.add_patch(_edge(boxes[link["source"]], boxes[link["target"]], link["weight"], most))
        for box in boxes.values():
            _draw_box(axes, box)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as its name ends: .svg, .pdf or .png (300 dpi), whole or not at all; same figure, same bytes."""
    kind = Path(path).suffix[1:]
    empty = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    empty["pdf"] = {"CreationDate": None, "Creator": None, "Producer": None}
    if kind not in empty:
        raise UserError(f"{path}: a figure is written as .svg, .pdf or .png")
    made = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure.savefig(made, format=kind, dpi=300, metadata=empty[kind])
    with whole_file(Path(path)) as beside:
        beside.write_bytes(made.getvalue())


def visible_token(text: str) -> str:
    """A token as people can see it: spaces, line ends and invisible characters have signs."""
    known = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
    invisible = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
    signs = (
        known.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in invisible else c) for c in text
    )  # fmt: skip
    return "".join(signs) or "∅"


def _chosen(document: Mapping[str, Any], max_nodes: int, max_edges: int) -> tuple[list, list]:
    """The nodes and edges that are drawn."""
    fixed = ("embedding", "logit")
    inner = [node for node in document["nodes"] if node["feature_type"] not in fixed]
    inner.sort(key=lambda node: (node.get("influence") is None, node.get("influence") or 0.0))
    kept = {node["node_id"] for node in inner[:max_nodes]}
    around = {node["node_id"] for node in document["nodes"] if node["feature_type"] in fixed}
    links = [link for link in document["links"] if {link["source"], link["target"]} <= kept | around]
    links.sort(key=lambda link: -abs(link["weight"]))
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


def _box(
    node: Mapping[str, Any], document: Mapping[str, Any], labels: Mapping[tuple[int, int], str], letters: int, most: int
) -> _Box:
    token = visible_token(document["metadata"]["prompt_tokens"][node["ctx_idx"]])
    kind, parts = node["feature_type"], node["node_id"].split("_")
    if kind == "embedding":
        text = token if len(token) <= 16 else f"{token[:15]}…"
    elif kind == "logit":
        quoted = node["clerp"].removeprefix('Output "').rsplit('" (p=', 1)[0]
        chance = node.get("token_prob") or 0.0
        text = f"{visible_token(quoted)}\n{'<1' if 0 < chance < 0.01 else f'{100 * chance:.0f}'} %"
    elif kind == "mlp reconstruction error":
        text = "error"
    else:
        feature = (int(parts[0]), int(parts[1])) if parts[0].isdigit() and parts[1].isdigit() else (-1, -1)
        label = labels.get(feature) or node["clerp"] or f"#{parts[1]}"
        lines = textwrap.wrap(label, letters) or [label]
        text = "\n".join(lines[:most]) + ("…" if len(lines) > most else "")
    lines = text.split("\n")
    width = max(_text_width(line) for line in lines) + 2 * _PAD
    return _Box(node, text, max(width, 0.2), len(lines) * _SIZE * 1.25 / 72 + 1.2 * _PAD)


def _fitted(nodes: list, document: Mapping[str, Any], labels: Mapping[tuple[int, int], str]) -> tuple:
    """Width, height and rows of ``_place``, and the boxes by id, with labels as wide as suits a page best."""
    best: tuple = (float("inf"),)
    for letters, lines in _LABELS:
        boxes = {node["node_id"]: _box(node, document, labels, letters, lines) for node in nodes}
        width, height, rows = _place(list(boxes.values()))
        excess = max(width / _PAGE[0], height / _PAGE[1], 1.0)
        if excess < best[0]:
            best = excess, width, height, rows, boxes
    return best[1:]


@functools.lru_cache(10_000)
def _text_width(text: str) -> float:
    """Inches of one line."""
    plain = text.replace("$", "\\$")  # a single dollar sign is none to TextPath
    return TextPath((0, 0), plain, size=_SIZE, prop=FontProperties(family="DejaVu Sans")).get_extents().width / 72


def _place(boxes: list[_Box]) -> tuple[float, float, list[tuple[str, float, float]]]:
    """Gives each box its place; the figure's width and height; name, middle and upper edge of each row."""
    outputs = [box for box in boxes if box.node["feature_type"] == "logit"]
    cells: dict[tuple[int, int], list[_Box]] = {}
    for box in boxes:
        if box.node["feature_type"] != "logit":
            layer = -1 if box.node["feature_type"] == "embedding" else int(box.node["layer"])
            cells.setdefault((layer, box.node["ctx_idx"]), []).append(box)
    width = _place_columns(cells)
    if width > _PAGE[0]:  # tokens upright take the most room
        for (layer, _), cell in cells.items():
            for box in cell if layer < 0 else ():
                box.width, box.height, box.upright = box.height, box.width, True
        width = _place_columns(cells)
    width = max(width, 3.4)
    layers = sorted({layer for layer, _ in cells})
    gap, y, rows = min(_ROW_GAP, max(0.13, 3.6 / len(layers))), 0.24, []
    for layer in layers:
        stacks = [cell for (row, _), cell in cells.items() if row == layer]
        tall = max(sum(box.height + _GAP for box in cell) - _GAP for cell in stacks)
        for cell in stacks:
            own = sum(box.height + _GAP for box in cell) - _GAP
            top = y + (tall if layer < 0 else (tall + own) / 2)
            for box in cell:
                box.y = top - box.height / 2
                top -= box.height + _GAP
        y += tall + gap
        rows.append(("E" if layer < 0 else str(layer), y - gap - tall / 2, y - gap / 2))
    lower = y
    line: list[_Box] = []
    for box in outputs:
        if line and sum(other.width + _GAP for other in [*line, box]) > width - _GUTTER - _GAP:
            y, line = _place_line(line, width, y), []
        line.append(box)
    y = _place_line(line, width, y)
    return width, y + 0.02, [*rows, ("out", (lower + y - _GAP) / 2, -1.0)]


def _place_columns(cells: Mapping[tuple[int, int], list[_Box]]) -> float:
    """Columns as close together as the boxes of each row allow; the width that all take."""
    right: dict[int, float] = {}  # of the last box in each row so far
    middle = _GUTTER
    for column in sorted({column for _, column in cells}):
        here = {layer: max(box.width for box in cell) for (layer, c), cell in cells.items() if c == column}
        starts = (right.get(layer, _GUTTER) + _GAP + wide / 2 for layer, wide in here.items())
        middle = max(middle + 2 * _GAP, *starts)
        for layer, wide in here.items():
            right[layer] = middle + wide / 2
            for box in cells[layer, column]:
                box.x = middle
    return max(right.values(), default=0.0) + _GAP


def _place_line(line: list[_Box], width: float, y: float) -> float:
    """Outputs side by side, the last one at the right edge; the next line's y."""
    right = width - _GAP
    for box in reversed(line):
        box.x, box.y = right - box.width / 2, y + box.height / 2
        right -= box.width + _GAP
    return y + max((box.height for box in line), default=0) + _GAP


def _edge(source: _Box, target: _Box, weight: float, most: float) -> PathPatch:
    below, above = source.y + source.height / 2, target.y - target.height / 2
    bend = max(0.12, 0.45 * (above - below))
    points = [(source.x, below), (source.x, below + bend), (target.x, above - bend), (target.x, above)]
    strength = abs(weight) / most
    return PathPatch(
        Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]), facecolor="none",
        edgecolor=BLUE if weight >= 0 else ORANGE, linestyle="-" if weight >= 0 else (0, (4, 1.5)),
        linewidth=0.4 + 2.2 * strength, alpha=0.35 + 0.55 * strength**0.5, zorder=1 + strength,
    )  # fmt: skip


def _draw_legend(axes: Any) -> None:
    x = _GUTTER + _GAP
    for name, color, style in (("excites", BLUE, "-"), ("inhibits", ORANGE, (0, (4, 1.5)))):
        axes.plot([x, x + 0.25], [0.09, 0.09], color=color, linestyle=style, linewidth=1.6)
        axes.text(x + 0.31, 0.09, name, size=_SIZE, color=SOFT, va="center_baseline")
        x += 0.4 + _text_width(name) + 0.15


def _draw_box(axes: Any, box: _Box) -> None:
    kind = box.node["feature_type"]
    corner = box.x - box.width / 2, box.y - box.height / 2
    look = dict(facecolor=CARD, edgecolor=SOFT, linewidth=0.6, zorder=3)
    if kind == "embedding":
        look |= dict(facecolor=INK, edgecolor=INK)
    elif kind == "mlp reconstruction error":
        look |= dict(facecolor=PAPER, linestyle=(0, (2, 1)))
    elif kind == "logit":
        look |= dict(facecolor=PAPER, edgecolor=INK, linewidth=1.1)
    if kind in ("embedding", "mlp reconstruction error"):
        axes.add_patch(Rectangle(corner, box.width, box.height, **look))
    else:
        style = "round,pad=0,rounding_size=0.05"
        axes.add_patch(FancyBboxPatch(corner, box.width, box.height, boxstyle=style, **look))
    color = PAPER if kind == "embedding" else INK
    axes.text(
        box.x, box.y, box.text, size=_SIZE, color=color, ha="center", va="center", linespacing=1.1, zorder=4,
        parse_math=False, rotation=90 * box.upright,
    )  # fmt: skip

"""The picture of a circuit: groups as boxes, layers from below, roles across, measured edges as arrows.

Where a circuit of the behaviour was published, its outline stands to the right, drawn in the same way from
``data/outlines.json``: groups with their role and row, and arrows without sizes.
"""

import importlib.resources
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from saejax.circuits.edges import ANSWER
from saejax.circuits.groups import ROLE_WORDS, ROLES, Key
from saejax.circuits.results import CircuitResults
from saejax.page.style import BLUE, INK, ORANGE, styled
from saejax.page.tables import number

CARD, SOFT, LINE = "#f5f7f9", "#555e68", "#d4d9df"  # the page's theme replaces them
# Inches: boxes of ours and of the outline, the height of both, what is between rows, and margins.
_BOX, _OUTLINE_BOX, _TALL, _GAP, _BELOW, _LEFT, _ABOVE = 2.2, 1.3, 0.86, 0.5, 0.75, 0.75, 0.75
_BETWEEN = 0.4  # inches between columns
_ASIDE = 0.55  # inches: to the outline, and twice as far as arrows go aside that pass boxes
_SIZE = 8.5  # points
_NAMED = 3  # features that a box names

_Point = tuple[float, float]


class _Box(NamedTuple):
    """A group in a picture: its role, height in inches, name, and a text below the name."""

    role: str
    y: float
    name: str
    text: str = ""


class _Arrow(NamedTuple):
    """An edge in a picture: its ends, its share of what it acts on, and its text."""

    source: str
    target: str
    share: float
    text: str = ""


def read_outline(behaviour: str) -> Mapping[str, Any] | None:
    """Return the outline of the circuit that was published of a behaviour; None if there is none."""
    outlines = json.loads((importlib.resources.files(__package__) / "data" / "outlines.json").read_text("utf-8"))
    # One published circuit is of antonyms in all languages.
    return outlines.get(behaviour) or outlines.get(behaviour.removesuffix("_french").removesuffix("_spanish"))


@styled
def draw_circuit(circuit: CircuitResults, names: Mapping[Key, str], outline: Mapping[str, Any] | None = None) -> Figure:
    """Draw the groups, and the edges that ``edges.judge_edges`` calls drawn.

    Args:
      circuit: of a behaviour.
      names: what features are called.
      outline: of the published circuit, drawn to the right.
    """
    step = _TALL + _GAP
    top = _BELOW + max(len(circuit.groups), 3) * step + 0.4  # of the answer
    boxes = {ANSWER: _Box("last", top, f"answer “{circuit.answer}”", f"logit difference {number(circuit.logit_diff)}")}
    for row, group in enumerate(sorted(circuit.groups, key=lambda group: group.layer)):
        shown = ", ".join(dict.fromkeys(names[key] for key in group.members[:_NAMED]))
        text = f"{len(group.members)} feature{'s' * (len(group.members) > 1)}: {shown}"
        boxes[group.name] = _Box(group.role, _BELOW + row * step + _TALL / 2, group.name, text)
    arrows = []
    for edge in circuit.drawn():
        whole = abs(circuit.logit_diff) if edge.target == ANSWER else 1.0
        text = edge.in_unit(number, edge.effect.mean)
        arrows.append(_Arrow(edge.source, edge.target, edge.effect.mean / max(whole, 1e-9), text))
    # The answer's column is there whatever the groups.
    roles = [role for role in ROLES if role in {box.role for box in boxes.values()}]
    width = _LEFT + len(roles) * (_BOX + _BETWEEN)
    whole_width = width + (_ASIDE + len(ROLES) * (_OUTLINE_BOX + _BETWEEN) if outline else 0.0)
    figure = Figure(figsize=(whole_width, top + _ABOVE))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, whole_width), ylim=(0, top + _ABOVE))
    axes.set_axis_off()
    for group in circuit.groups:
        y = boxes[group.name].y
        axes.plot([_LEFT - 0.05, width], [y, y], color=LINE, linewidth=0.5, zorder=0)
        axes.text(_LEFT - 0.1, y, f"layer {group.layer:.0f}", size=_SIZE, color=SOFT, ha="right", va="center")
    _draw_panel(axes, "Measured here", _LEFT, roles, boxes, arrows, _BOX)
    if outline:
        axes.plot([width + 0.3] * 2, [0.1, top + _ABOVE - 0.1], color=LINE, linewidth=0.8)
        spread = (top - 0.5 - _BELOW) / (max(row for *_, row in outline["groups"]) + 1)
        published = {ANSWER: _Box("last", top, f"answer “{outline['answer']}”")}
        for key, name, role, row in outline["groups"]:
            published[key] = _Box(role, _BELOW + row * spread + _TALL / 2, name)
        edges = [_Arrow(source, target, 0.3) for source, target in outline["edges"]]
        _draw_panel(axes, "As published, of a larger model", width + _ASIDE, ROLES, published, edges, _OUTLINE_BOX)
    return figure


def _draw_panel(
    axes: Axes,
    title: str,
    left: float,
    roles: Sequence[str],
    boxes: Mapping[str, _Box],
    arrows: Sequence[_Arrow],
    wide: float,
) -> None:
    """Draw boxes and arrows under a title, a column for each role."""
    x_of = {role: left + (k + 0.5) * (wide + _BETWEEN) for k, role in enumerate(roles)}
    axes.text(
        left + _BETWEEN / 2, boxes[ANSWER].y + 0.55, title, size=_SIZE + 1.5, color=INK, weight="bold", va="center"
    )
    for role, x in x_of.items():
        axes.text(x, 0.38, ROLE_WORDS[role], size=_SIZE, color=SOFT, ha="center", va="center")
    centre = {name: (x_of[box.role], box.y) for name, box in boxes.items()}
    tall = {name: 0.5 if name == ANSWER else _TALL for name in boxes}
    for name, box in boxes.items():
        _draw_box(axes, *centre[name], box, wide, tall[name])
    # Where no text of an arrow may be: centres, and half of widths and heights.
    taken = [(*centre[name], wide / 2, tall[name] / 2 + 0.08) for name in boxes]
    for arrow in arrows:
        start, bend, end = _route(centre, tall, arrow.source, arrow.target, wide)
        color, style = (BLUE, "-") if arrow.share > 0 else (ORANGE, (0, (4, 1.5)))
        axes.add_patch(
            FancyArrowPatch(
                start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9, color=color,
                linewidth=0.8 + 3.0 * min(abs(arrow.share), 1.0), linestyle=style, zorder=2, shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip
        # The middle first; then further away from both ends, where other arrows meet.
        points = [_along(start, bend, end, part) for part in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)]
        free = [p for p in points if all(abs(p[0] - x) > w or abs(p[1] - y) > h for x, y, w, h in taken)]
        x, y = (free or points)[0]
        if arrow.text:
            taken.append((x, y, 0.4, 0.17))
            axes.text(
                x, y, arrow.text, size=_SIZE, color=INK, ha="center", va="center", zorder=5,
                bbox=dict(facecolor=CARD, edgecolor="none", pad=1.0),
            )  # fmt: skip


def _route(
    centre: Mapping[str, _Point], tall: Mapping[str, float], source: str, target: str, wide: float
) -> tuple[_Point, float, _Point]:
    """Return start, bend and end of an arrow; one that would cross boxes of its own column passes on their right."""
    (x0, y0), (x1, y1) = centre[source], centre[target]
    low, high = sorted((y0, y1))
    if abs(x0 - x1) < 0.1 and any(abs(x - x0) < 0.1 and low < y < high for x, y in centre.values()):
        return (x0 + wide / 2, y0), _ASIDE / (y1 - y0), (x1 + wide / 2, y1)
    up = 1 if y1 >= y0 else -1
    return (x0, y0 + up * tall[source] / 2), 0.0, (x1, y1 - up * tall[target] / 2)


def _along(start: _Point, bend: float, end: _Point, part: float) -> _Point:
    """Return a point of an arrow, the quadratic curve that matplotlib draws for ``arc3``."""
    (x0, y0), (x1, y1) = start, end
    x, y = (x0 + x1) / 2 + bend * (y1 - y0), (y0 + y1) / 2 - bend * (x1 - x0)
    first, middle, last = (1 - part) ** 2, 2 * part * (1 - part), part**2
    return first * x0 + middle * x + last * x1, first * y0 + middle * y + last * y1


def _draw_box(axes: Axes, x: float, y: float, box: _Box, wide: float, tall: float) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - wide / 2, y - tall / 2), wide, tall, boxstyle="round,pad=0,rounding_size=0.06", facecolor=CARD,
            edgecolor=SOFT, linewidth=0.8, zorder=3,
        )
    )  # fmt: skip
    # As many letters to a line as a box has room for.
    name, text = (
        textwrap.wrap(words, int(wide * letters))[:2] for words, letters in ((box.name, 13.5), (box.text, 17))
    )
    step = min(tall / (len(name + text) + 0.4), 0.18)
    top = y + step * (len(name + text) - 1) / 2
    for k, line in enumerate(name + text):
        size, color, weight = (_SIZE, INK, "bold") if k < len(name) else (_SIZE - 1, SOFT, "normal")
        axes.text(
            x, top - k * step, line, size=size, color=color, weight=weight, ha="center", va="center", zorder=4,
            parse_math=False,
        )  # fmt: skip

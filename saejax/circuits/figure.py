"""The picture of a circuit: groups as boxes, layers from below, roles across, measured edges as arrows.

Where a circuit of the behaviour was published, its outline stands beside ours, drawn in the same way from
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
from saejax.circuits.groups import ROLE_WORDS, ROLES, short_name
from saejax.circuits.results import CircuitResults, GroupResults
from saejax.page.style import BLUE, INK, ORANGE, styled
from saejax.page.tables import number, percent

CARD, SOFT, LINE = "#f5f7f9", "#555e68", "#d4d9df"  # the page's theme replaces them
_BOX, _TALL, _GAP, _BELOW, _LEFT = 2.2, 0.86, 0.5, 0.75, 0.75  # inches
_COLUMN, _NARROW, _SPARE = 2.65, 1.6, 0.3  # inches of a column of ours, of the outline, and of the latter free
_ASIDE = 0.55  # inches, twice as far as arrows go aside that pass boxes
_SIZE = 8.5  # points
_NAMED = 3  # features that a box names
_LANGUAGES = dict(antonym_french="antonym", antonym_spanish="antonym")  # one published circuit is of all three


_Point = tuple[float, float]


class _Box(NamedTuple):
    """A group in a picture: its role and row, and lines of text, of which the first ones are its name."""

    role: str
    row: float
    name: list[str]
    lines: list[str]


class _Arrow(NamedTuple):
    """An edge in a picture: its ends, its share of what it acts on, from -1 to 1, and its text."""

    source: str
    target: str
    share: float
    text: str


def read_outline(behaviour: str) -> Mapping[str, Any] | None:
    """Return the outline of the circuit that was published of a behaviour; None if there is none."""
    text = (importlib.resources.files(__package__) / "data" / "outlines.json").read_text("utf-8")
    return json.loads(text).get(_LANGUAGES.get(behaviour, behaviour))


@styled
def draw_circuit(circuit: CircuitResults, names: Mapping[str, str], outline: Mapping[str, Any] | None = None) -> Figure:
    """Draw the groups, and the edges that ``edges.judge_edges`` calls drawn.

    Args:
      circuit: of a behaviour.
      names: feature, as layer_index_role -> what it is called.
      outline: of the published circuit, drawn to the right.
    """
    order = sorted(circuit.groups, key=lambda group: group.layer)
    boxes, arrows = _measured(circuit, order, names), _arrows(circuit)
    # The answer's column is there whatever the groups.
    roles = [role for role in ROLES if role in {box.role for box in boxes.values()} | {"last"}]
    width, rows = _LEFT + len(roles) * _COLUMN, len(order)
    outline_width = 0.5 + len(ROLES) * _NARROW if outline else 0.0
    height = _BELOW + max(rows, 3) * (_TALL + _GAP) + 1.15
    figure = Figure(figsize=(width + outline_width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width + outline_width), ylim=(0, height))
    axes.set_axis_off()
    words = {role: f"“{text}”" if (text := circuit.example.get(role)) else "" for role in roles}
    x_of = {role: _LEFT + _COLUMN * (k + 0.5) for k, role in enumerate(roles)}
    for row, group in enumerate(order):
        y = _BELOW + row * (_TALL + _GAP) + _TALL / 2
        axes.plot([_LEFT - 0.05, width], [y, y], color=LINE, linewidth=0.5, zorder=0)
        axes.text(_LEFT - 0.1, y, f"layer {group.layer:.0f}", size=_SIZE, color=SOFT, ha="right", va="center")
    top = height - 0.75
    _panel(axes, "Measured here", x_of, words, boxes, arrows, top, _BOX)
    if outline:
        start = width + 0.3
        axes.plot([start - 0.15] * 2, [0.1, height - 0.1], color=LINE, linewidth=0.8)
        columns = {role: start + _NARROW * (k + 0.5) for k, role in enumerate(ROLES)}
        step = (top - 0.5 - _BELOW) / ((max(row for *_, row in outline["groups"]) + 1) * (_TALL + _GAP))
        published = {
            key: _Box(role, row * step, textwrap.wrap(text, 16), []) for key, text, role, row in outline["groups"]
        }
        edges = [_Arrow(source, target, 0.3, "") for source, target in outline["edges"]]
        published[ANSWER] = _Box("last", -1, [f"answer “{outline['answer']}”"], [])
        _panel(axes, "As published, of a larger model", columns, {}, published, edges, top, _NARROW - _SPARE)
    return figure


def _measured(circuit: CircuitResults, order: Sequence[GroupResults], names: Mapping[str, str]) -> dict[str, _Box]:
    boxes = {
        ANSWER: _Box("last", -1, [f"answer “{circuit.answer}”"], [f"logit difference {number(circuit.logit_diff)}"])
    }
    for row, group in enumerate(order):
        shown = ", ".join(dict.fromkeys(names.get(member, member) for member in group.members[:_NAMED]))
        title = short_name(group.name)  # the rest is said by rows and columns
        lines = [f"{len(group.members)} feature{'s' * (len(group.members) > 1)}: {shown}"]
        boxes[group.name] = _Box(role_of(group), row, textwrap.wrap(title, 30)[:2], textwrap.wrap(lines[0], 38)[:2])
    return boxes


def _arrows(circuit: CircuitResults) -> list[_Arrow]:
    arrows = []
    for edge in circuit.drawn():
        effect, to_answer = edge.effect.mean, edge.target == ANSWER
        share = effect / max(abs(circuit.logit_diff), 1e-9) if to_answer else effect
        text = number(effect) if to_answer else percent(effect)
        arrows.append(_Arrow(edge.source, edge.target, min(max(share, -1.0), 1.0), text))
    return arrows


def _panel(
    axes: Axes,
    title: str,
    x_of: Mapping[str, float],
    words: Mapping[str, str],
    boxes: Mapping[str, _Box],
    arrows: Sequence[_Arrow],
    top: float,
    wide: float,
) -> None:
    """Draw boxes and arrows under a title, the answer at the top."""
    left = min(x_of.values()) - wide / 2
    axes.text(left, top + 0.55, title, size=_SIZE + 1.5, color=INK, weight="bold", va="center")
    for role, x in x_of.items():
        axes.text(x, 0.38, ROLE_WORDS[role], size=_SIZE, color=SOFT, ha="center", va="center")
        example = textwrap.shorten(words.get(role, ""), 38, placeholder=" …”").replace("… …", "…")
        axes.text(x, 0.18, example, size=_SIZE - 1, color=SOFT, ha="center", va="center", parse_math=False)
    height = {name: 0.5 if name == ANSWER else _TALL for name in boxes}
    place = {
        name: (x_of[box.role], top if name == ANSWER else _BELOW + box.row * (_TALL + _GAP) + _TALL / 2)
        for name, box in boxes.items()
    }
    for name, box in boxes.items():
        _draw_box(axes, *place[name], box, wide, height[name])
    labels: list[tuple[float, float]] = []
    for arrow in arrows:
        start, bend, end = _route(place, height, arrow.source, arrow.target, wide)
        color = BLUE if arrow.share > 0 else ORANGE
        axes.add_patch(
            FancyArrowPatch(
                start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9, color=color,
                linewidth=0.8 + 3.0 * abs(arrow.share), linestyle="-" if color == BLUE else (0, (4, 1.5)), zorder=2,
                shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip
        if arrow.text:
            # The middle first; then further away from both ends, where other arrows meet.
            points = [_along(start, bend, end, part) for part in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)]
            free = [p for p in points if all(abs(p[0] - x) > 0.4 or abs(p[1] - y) > 0.17 for x, y in labels)]
            clear = [p for p in free if not any(_inside(p, place[name], wide, height[name]) for name in boxes)]
            labels.append((clear or free or points)[0])
            axes.text(
                *labels[-1], arrow.text, size=_SIZE, color=INK, ha="center", va="center", zorder=5,
                bbox=dict(facecolor=CARD, edgecolor="none", pad=1.0),
            )  # fmt: skip


def _route(
    place: Mapping[str, _Point], height: Mapping[str, float], source: str, target: str, wide: float
) -> tuple[_Point, float, _Point]:
    """Return start, bend and end of an arrow; one that would cross boxes of its own column passes on their right."""
    (x0, y0), (x1, y1) = place[source], place[target]
    low, high = sorted((y0, y1))
    if abs(x0 - x1) < 0.1 and any(abs(x - x0) < 0.1 and low < y < high for x, y in place.values()):
        return (x0 + wide / 2, y0), _ASIDE / (y1 - y0), (x1 + wide / 2, y1)
    up = 1 if y1 >= y0 else -1
    return (x0, y0 + up * height[source] / 2), 0.0, (x1, y1 - up * height[target] / 2)


def _along(start: _Point, bend: float, end: _Point, part: float) -> _Point:
    """Return a point of an arrow, the quadratic curve that matplotlib draws for ``arc3``."""
    (x0, y0), (x1, y1) = start, end
    x, y = (x0 + x1) / 2 + bend * (y1 - y0), (y0 + y1) / 2 - bend * (x1 - x0)
    first, middle, last = (1 - part) ** 2, 2 * part * (1 - part), part**2
    return first * x0 + middle * x + last * x1, first * y0 + middle * y + last * y1


def _inside(point: _Point, box: _Point, wide: float, tall: float) -> bool:
    return abs(point[0] - box[0]) < wide / 2 and abs(point[1] - box[1]) < tall / 2 + 0.08


def role_of(group: GroupResults) -> str:
    """Return the role at which most features of a group stand."""
    roles = [member.rpartition("_")[2] for member in group.members]
    return max(ROLES, key=roles.count)


def _draw_box(axes: Axes, x: float, y: float, box: _Box, wide: float, tall: float) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - wide / 2, y - tall / 2), wide, tall, boxstyle="round,pad=0,rounding_size=0.06", facecolor=CARD,
            edgecolor=SOFT, linewidth=0.8, zorder=3,
        )
    )  # fmt: skip
    lines = [*box.name, *box.lines]
    step = min(tall / (len(lines) + 0.4), 0.18)
    top = y + step * (len(lines) - 1) / 2
    for k, text in enumerate(lines):
        is_name = k < len(box.name)
        axes.text(
            x, top - k * step, text, size=_SIZE if is_name else _SIZE - 1, color=INK if is_name else SOFT, ha="center",
            va="center", zorder=4, weight="bold" if is_name else "normal", parse_math=False,
        )  # fmt: skip

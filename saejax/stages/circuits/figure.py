"""The picture of a circuit: groups as boxes, by layer from below, roles across, measured edges as arrows.

Where a circuit of the behaviour was published, its outline stands to the right, drawn in the same way from
``data/outlines.json``: groups with their role and row, and arrows without sizes.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saejax.circuits.groups import ANSWER, ROLE_WORDS, ROLES, Key
from saejax.circuits.results import CircuitResults
from saejax.files import read_json
from saejax.page.style import BLUE, INK, ORANGE, drawable, styled
from saejax.page.tables import number
from saejax.stages.circuits.claims import DATA
from saejax.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CARD, SOFT = "#f5f7f9", "#555e68"  # the page's theme replaces them
# Inches: columns of ours and of the outline, rows, the height of a box, and margins around the middles of boxes.
_COLUMN, _OUTLINE_COLUMN, _ROW, _TALL, _BELOW, _ABOVE = 2.6, 1.7, 1.36, 0.86, 1.2, 0.9
_BETWEEN = 0.4  # inches between the boxes of two columns
_ASIDE = 0.55  # inches: twice as far as arrows go aside that pass boxes
_SIZE = 8.5  # points
_NAMED = 3  # features that a box names

_Box = tuple[str, float, str, str]  # role, row from below, name, and a text below the name
_Arrow = tuple[str, str, float, str]  # source, target, share of its target, and its text


def read_outline(behaviour: str) -> Mapping[str, Any] | None:
    """Return the outline of the circuit that was published of a behaviour; None if there is none."""
    outlines = read_json(DATA / "outlines.json")
    # One published circuit is of antonyms in all languages.
    return outlines.get(behaviour) or outlines.get(behaviour.removesuffix("_french").removesuffix("_spanish"))


@styled
def draw_circuit(
    circuit: CircuitResults, names: Mapping[Key, str], outline: Mapping[str, Any] | None = None
) -> "Figure":
    """Draw the groups, and the edges that ``edges.judge_edges`` calls drawn.

    Args:
      circuit: the circuit of a behaviour.
      names: names of the features.
      outline: outline of the published circuit, drawn to the right.
    """
    from matplotlib.figure import Figure

    top = max(len(circuit.groups), 3)  # row of the answer
    width = len(ROLES) * _COLUMN + _ASIDE
    size = width + (len(ROLES) * _OUTLINE_COLUMN if outline else 0.0), _BELOW + top * _ROW + _ABOVE
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(0, size[1]))
    axes.set_axis_off()
    boxes: dict[str, _Box] = {
        ANSWER: ("last", top, f"answer “{circuit.answer}”", f"logit difference {number(circuit.logit_diff)}")
    }
    for row, group in enumerate(sorted(circuit.groups, key=lambda group: group.layer)):
        shown = ", ".join(dict.fromkeys(names[key] for key in group.members[:_NAMED]))
        count = counted(len(group.members), "feature")
        boxes[group.name] = group.role, row, group.name, f"layer {group.layer:.0f}, {count}: {shown}"
    arrows = []
    for edge in circuit.drawn():
        whole = abs(circuit.logit_diff) if edge.target == ANSWER else 1.0
        share = edge.effect.mean / max(whole, 1e-9)
        arrows.append((edge.source, edge.target, share, edge.in_unit(number, edge.effect.mean)))
    _draw_panel(axes, "Measured here", 0, _COLUMN, boxes, arrows)
    if outline:
        step = top / (max(row for *_, row in outline["groups"]) + 1)
        published = {key: (role, row * step, name, "") for key, name, role, row in outline["groups"]}
        published[ANSWER] = "last", top, f"answer “{outline['answer']}”", ""
        edges = [(source, target, 0.3, "") for source, target in outline["edges"]]
        _draw_panel(axes, "As published, of a larger model", width, _OUTLINE_COLUMN, published, edges)
    return figure


def _draw_panel(
    axes: "Axes", title: str, left: float, column: float, boxes: Mapping[str, _Box], arrows: Sequence[_Arrow]
) -> None:
    """Draw boxes and arrows under a title, a column for each role."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    wide = column - _BETWEEN
    x_of = {role: left + (k + 0.5) * column for k, role in enumerate(ROLES)}
    centre = {key: np.array([x_of[role], _BELOW + row * _ROW]) for key, (role, row, *_) in boxes.items()}
    axes.text(left + _BETWEEN / 2, centre[ANSWER][1] + 0.65, title, size=_SIZE + 1.5, color=INK, weight="bold")
    for role, x in x_of.items():
        axes.text(x, 0.38, ROLE_WORDS[role], size=_SIZE, color=SOFT, ha="center")
    for key, (_, _, name, text) in boxes.items():
        x, y = centre[key]
        axes.add_patch(
            FancyBboxPatch(
                (x - wide / 2, y - _TALL / 2), wide, _TALL, boxstyle="round,pad=0,rounding_size=0.06", facecolor=CARD,
                edgecolor=SOFT, linewidth=0.8, zorder=3,
            )
        )  # fmt: skip
        # As many letters to a line as a box has room for, and two lines of each.
        name, text = (
            "\n".join(textwrap.wrap(drawable(words), int(wide * letters))[:2])
            for words, letters in ((name, 13.5), (text, 17))
        )
        common: dict[str, Any] = dict(ha="center", zorder=4)
        where = "bottom" if text else "center"
        axes.text(x, y, name, size=_SIZE, color=INK, weight="bold", va=where, **common)
        axes.text(x, y - 0.05, text, size=_SIZE - 1, color=SOFT, va="top", **common)
    # Where no text of an arrow may be: centres, and half of widths and heights.
    taken = [(*point, wide / 2, _TALL / 2 + 0.08) for point in centre.values()]
    for source, target, share, text in arrows:
        start, end = centre[source], centre[target]
        low, high = sorted((start[1], end[1]))
        if any(x == start[0] == end[0] and low < y < high for x, y in centre.values()):
            # It would cross boxes of its own column, and passes on their right.
            start, end = start + (wide / 2, 0), end + (wide / 2, 0)
            bend = (start + end) / 2 + (_ASIDE, 0)
        else:
            up = np.array([0, np.sign(end[1] - start[1]) * _TALL / 2])
            start, bend, end = start + up, (start + end) / 2, end - up
        color, line = (BLUE, "-") if share > 0 else (ORANGE, (0, (4, 1.5)))
        axes.add_patch(
            FancyArrowPatch(
                path=Curve([start, bend, end], [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3]), arrowstyle="-|>",
                mutation_scale=9, color=color, linewidth=0.8 + 3 * min(abs(share), 1), linestyle=line, zorder=2,
            )
        )  # fmt: skip
        if text:
            # The middle first; then further away from both ends, where other arrows meet.
            parts = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)
            points = [(1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end for t in parts]
            free = [p for p in points if all(abs(p[0] - x) > w or abs(p[1] - y) > h for x, y, w, h in taken)]
            x, y = (free or points)[0]
            taken.append((x, y, 0.4, 0.17))
            card = dict(facecolor=CARD, edgecolor="none", pad=1.0)
            axes.text(x, y, text, size=_SIZE, color=INK, ha="center", va="center", zorder=5, bbox=card)

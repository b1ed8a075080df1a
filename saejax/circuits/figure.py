"""The picture of a circuit: groups as boxes, layers from below, roles across, measured edges as arrows."""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from saejax.circuits.edges import ANSWER
from saejax.circuits.groups import ROLES
from saejax.circuits.results import CircuitResults, GroupResults
from saejax.page.style import BLUE, INK, ORANGE, PAPER, styled
from saejax.page.tables import number, percent

CARD, SOFT, LINE = "#f5f7f9", "#555e68", "#d4d9df"  # the page's theme replaces them
_WIDTH, _BOX, _TALL, _GAP = 8.4, 2.2, 0.78, 0.62  # inches
_SIZE = 7.5  # points
_NAMED = 3  # features that a box names


@styled
def draw_circuit(circuit: CircuitResults, names: Mapping[str, str]) -> Figure:
    """Draw the groups, and the edges that ``edges.judge_edges`` calls drawn.

    Args:
      circuit: of a behaviour.
      names: feature, as layer_index_role -> what it is called.
    """
    order = sorted(circuit.groups, key=lambda group: group.layer)
    height = 0.9 + len(order) * (_TALL + _GAP)
    figure = Figure(figsize=(_WIDTH, height + 0.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _WIDTH), ylim=(0, height + 0.5))
    axes.set_axis_off()
    columns = [role for role in ROLES if any(role_of(group) == role for group in order)]
    x_of = {role: 0.9 + (_WIDTH - 0.9) * (k + 0.5) / max(len(columns), 1) for k, role in enumerate(columns)}
    place = {ANSWER: (x_of.get("last", _WIDTH / 2), height)}
    for row, group in enumerate(order):
        y = 0.7 + row * (_TALL + _GAP) + _TALL / 2
        place[group.name] = x_of[role_of(group)], y
        axes.plot([0.75, _WIDTH], [y, y], color=LINE, linewidth=0.5, zorder=0)
        axes.text(0.7, y, f"layer {group.layer:.0f}", size=_SIZE, color=SOFT, ha="right", va="center")
        lines = [group.name, f"{len(group.members)} features"]
        shown = ", ".join(dict.fromkeys(names.get(member, member) for member in group.members[:_NAMED]))
        lines += textwrap.wrap(shown, 34)[:2]
        _box(axes, *place[group.name], lines)
    _box(axes, *place[ANSWER], ["answer", f"logit difference {number(circuit.logit_diff)}"], tall=0.45)
    for role, x in x_of.items():
        axes.text(x, 0.3, _ROLE_WORDS[role], size=_SIZE, color=SOFT, ha="center", va="center")
    drawn = [edge for edge in circuit.edges if edge.drawn and edge.edit == "direct"]
    for edge in drawn:
        to_answer = edge.target == ANSWER
        share = edge.effect.mean / max(abs(circuit.logit_diff), 1e-9) if to_answer else edge.effect.mean
        (x0, y0), (x1, y1) = place[edge.source], place[edge.target]
        start = (x0, y0 + _TALL / 2)
        end = (x1, y1 - (0.45 if to_answer else _TALL) / 2)
        color = BLUE if edge.effect.mean > 0 else ORANGE
        bend = 0.25 if abs(x0 - x1) < 0.1 and y1 - y0 > 1.5 * (_TALL + _GAP) else 0.0
        axes.add_patch(
            FancyArrowPatch(
                start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9, color=color,
                linewidth=0.8 + 3.0 * min(abs(share), 1.0), linestyle="-" if color == BLUE else (0, (4, 1.5)), zorder=2,
                shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip
        middle = (x0 + x1) / 2 + bend * (y1 - y0) / 2, (start[1] + end[1]) / 2
        text = number(edge.effect.mean) if to_answer else percent(edge.effect.mean)
        axes.text(
            *middle, text, size=_SIZE, color=INK, ha="center", va="center", zorder=4,
            bbox=dict(facecolor=PAPER, edgecolor="none", pad=1.0),
        )  # fmt: skip
    return figure


_ROLE_WORDS = dict(content="what differs from the counterpart", context="the words around it", last="last position")


def role_of(group: GroupResults) -> str:
    """Return the role at which most features of a group stand."""
    roles = [member.rpartition("_")[2] for member in group.members]
    return max(ROLES, key=roles.count)


def _box(axes, x: float, y: float, lines: Sequence[str], tall: float = _TALL) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - _BOX / 2, y - tall / 2), _BOX, tall, boxstyle="round,pad=0,rounding_size=0.06", facecolor=CARD,
            edgecolor=SOFT, linewidth=0.8, zorder=3,
        )
    )  # fmt: skip
    step = min(tall / (len(lines) + 0.6), 0.17)
    top = y + step * (len(lines) - 1) / 2
    for k, text in enumerate(lines):
        axes.text(
            x, top - k * step, text, size=_SIZE, color=INK if k != 1 else SOFT, ha="center", va="center", zorder=4,
            weight="bold" if k == 0 else "normal", parse_math=False,
        )  # fmt: skip

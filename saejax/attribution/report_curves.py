"""The picture of what parts of graphs do alone, in the report."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from saejax.attribution.report_graphs import ReportedGraph, known
from saejax.attribution.results import CurveResults
from saejax.page import style
from saejax.page.blocks import Picture
from saejax.page.findings import Draw
from saejax.page.tables import number, percent

_LOW, _HIGH = -0.5, 1.5  # of the shares that the curves show
_PANELS = dict(
    faithfulness="Faithfulness: the graph alone",
    incompleteness="Incompleteness: all but the graph",
)


def pictured(graphs: Sequence[ReportedGraph], draw: Draw) -> Picture:
    shown = {graph.name: graph.curve for graph in graphs if graph.curve}
    kept = next(iter(shown.values())).share
    caption = (
        "Each graph was pruned to growing shares of its influence, and the model run with these features and errors "
        "alone (above), and with all others alone (below). 0 is the first answer's logit without any feature and "
        "error, 1 that of the model. A part that does the work is near 1 above and near 0 below."
    )
    if any(
        not _LOW <= v <= _HIGH for curve in shown.values() for kind in _PANELS for v in getattr(curve, kind) if known(v)
    ):
        caption += " Values beyond the panels are drawn at their edges."
    if len(shown) > len(style.LINES):
        caption += " Grey: each graph; blue: their median."
    alt = "Faithfulness and incompleteness. " + " ".join(
        f"{name}: alone {number(curve.faithfulness[middle])}, all others {number(curve.incompleteness[middle])} "
        f"at {percent(kept[middle])} of the influence."
        for name, curve in shown.items()
        for middle in [len(curve.share) // 2]
    )
    return draw("graph_curves", curves(shown), caption, alt)


@style.styled
def curves(shown: Mapping[str, CurveResults]) -> Figure:
    """Faithfulness and incompleteness by the share of influence that is kept, a line for each graph.

    Args:
      shown: by name; None or NaN leaves a gap. Of more graphs than there are styles of lines all are grey, and their
        median stands out.
    """
    many = len(shown) > len(style.LINES)
    legend_inches = 0.35 + 0.17 * (2 if many else len(shown))
    figure, below = style.panels([1.9, 1.9 + legend_inches], list(_PANELS.values()))
    for axes, kind in zip(below, _PANELS, strict=True):
        lines = {name: np.array(getattr(curve, kind), float) for name, curve in shown.items()}
        for (name, line_C), place in zip(lines.items(), range(len(lines)), strict=True):
            color, dashes, marker = (style.GREY, "-", "") if many else style.LINES[place]
            look = dict(alpha=0.5, linewidth=1.0) if many else dict(markersize=3.5, linewidth=1.4)
            share_C, shown_C = 100 * np.array(shown[name].share), np.clip(line_C, _LOW, _HIGH)
            label = "a graph" if many else name
            axes.plot(share_C, shown_C, color=color, linestyle=dashes, marker=marker, label=label, **look)
        if many:
            axes.plot(*_median(shown, kind), color=style.BLUE, marker="o", markersize=3.5, label="median of the graphs")
        for level in (0, 1):
            axes.axhline(level, color=style.INK, linewidth=0.8, linestyle="-" if level == 0 else ":")
        axes.set(xlim=(0, 102), ylim=(_LOW - 0.1, _HIGH + 0.1), ylabel="share")
        axes.yaxis.set_major_locator(MultipleLocator(0.5))
        axes.grid(axis="y", color=style.INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("% of the influence that is kept")
    style.legend(below[-1], 1)
    return figure


def _median(shown: Mapping[str, CurveResults], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Of all graphs, at every share that one of them has: the shares in per cent, and the medians of known values."""
    points: dict[float, list[float]] = {}
    for curve in shown.values():
        for share, value in zip(curve.share, getattr(curve, kind), strict=True):
            if known(value):
                points.setdefault(share, []).append(value)
    share_C = np.array(sorted(points))
    return 100 * share_C, np.clip([np.median(points[share]) for share in share_C], _LOW, _HIGH)

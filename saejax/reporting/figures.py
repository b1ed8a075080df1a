"""The report's figures: plain data in, a matplotlib ``Figure`` out; ``save`` writes it, ``inline`` embeds it.

Figures are 4.4 inches wide with 9 to 10 point text, so that they read at their own size in the 360 pixels of
a phone. Colours are Okabe and Ito's, which colour-blind readers tell apart and which stand out on white as on
dark grey; shapes differ as well. Everything that is ink (text, axes) has the one colour ``INK``, which
``inline`` hands to the page, so that a dark page shows light ink. The same data give the same bytes.

An interval is a mapping ``{"mean", "low", "high"}``; all intervals shown are 95 % intervals.
"""

import dataclasses
import functools
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from saejax.workspace import whole_file

Interval = Mapping[str, float]
P = ParamSpec("P")

INK, PAPER = "#1b1f24", "#ffffff"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#b8628f", "#7f7f7f"
VIOLET, OCHRE = "#7a5cc4", "#a07800"
MANY_POINTS = 300  # above this, a cloud of points is drawn as pixels also in an SVG
_WIDTH = 4.4  # inches
_LINES: tuple[tuple[str, Any, str], ...] = (
    (BLUE, "-", "o"),
    (ORANGE, "--", "s"),
    (GREEN, "-.", "^"),
    (PINK, ":", "D"),
    (VIOLET, (0, (8, 2)), "v"),
    (OCHRE, (0, (5, 1, 1, 1, 1, 1)), "P"),
    (INK, (0, (3, 1)), "X"),
)
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "saejax",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
}


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws with this module's style, whatever the caller has set."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
            return draw(*args, **kwargs)

    return styled


def _panels(heights: Sequence[float], titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure of panels one below the other, heights in inches, each with its title at the figure's left edge."""
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.07, hspace=0.04))
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, title in zip(panels, titles, strict=True):
        text = textwrap.fill(title, 50)
        # A blank title of the axes keeps the room; the text itself starts further left than the axes.
        axes.set_title("\n".join(" " for _ in text.splitlines()))
        axes.annotate(
            text, (0.012, 1), (0, 6), ("figure fraction", "axes fraction"), "offset points", weight="bold", size=10
        ).set_in_layout(False)
    return figure, list(panels)


def _error(value: Interval, scale: float = 1.0) -> np.ndarray:
    """[2, 1] lengths of the error bar below and above the mean, never negative."""
    mean, low, high = (value[key] * scale for key in ("mean", "low", "high"))
    return np.array([[max(mean - low, 0.0)], [max(high - mean, 0.0)]])


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows named from the top down, and a grid across them."""
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 16) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.7)


def _height(names: Iterable[str], least: float) -> float:
    """Inches that rows of these names take, at least ``least`` each."""
    names = list(names)
    lines = max(len(textwrap.wrap(name, 16)) for name in names)
    return len(names) * max(least, 0.05 + 0.155 * lines)


def _point(axes: Axes, value: Interval, y: float, color: str, marker: str, label: str, scale: float = 1.0, size=6.0):
    axes.errorbar(
        [value["mean"] * scale], [y], xerr=_error(value, scale), fmt=marker, color=color, markersize=size,
        elinewidth=1.8, capsize=3, label=label, zorder=3,
    )  # fmt: skip


def _legend(axes: Axes, columns: int) -> None:
    """A legend below the axes that names each label once."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=columns, handlelength=1.6)


@_styled
def baselines(scores: Mapping[str, Mapping[str, Mapping[str, Interval]]], min_accuracy: float) -> Figure:
    """What the model can do: accuracy and logit difference of each behaviour.

    Args:
      scores: behaviour -> split ("test", "train") -> {"accuracy", "logit_diff"} intervals.
      min_accuracy: the accuracy below which a behaviour is flagged, drawn as a line; 0 to 1.
    """
    rows = _height(scores, 0.36)
    figure, (left, right) = _panels(
        (rows + 0.75, rows + 1.0),
        ("Accuracy: correct answer above the wrong one", "Logit of the correct minus the wrong answer"),
    )
    for row, splits in enumerate(scores.values()):
        for shift, (split, color, marker) in zip(
            (-0.14, 0.14), (("test", BLUE, "o"), ("train", GREY, "s")), strict=True
        ):
            label = f"{split} prompts, with 95 % interval"
            _point(left, splits[split]["accuracy"], row + shift, color, marker, label, scale=100)
            _point(right, splits[split]["logit_diff"], row + shift, color, marker, label)
    left.axvline(100 * min_accuracy, color=INK, linewidth=1, linestyle=":")
    left.set(
        xlabel=f"% of prompts (dotted: flagged below {100 * min_accuracy:.0f} %)",
        xlim=(min(left.get_xlim()[0], 45), 102),
    )
    right.axvline(0, color=INK, linewidth=1)
    right.set_xlabel("logits")
    for axes in (left, right):
        _rows(axes, list(scores))
    _legend(right, 1)
    return figure


@_styled
def training(curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> Figure:
    """How training went: explained variance and L0 on training batches.

    Args:
      curves: kind -> for each member {"tokens", "explained_variance", "l0"}, of equal lengths; none if there is no
        record. Of several members the median is drawn, and a band from the least to the greatest.
    """
    figure, (upper, lower) = _panels(
        (2.0, 2.3), ("Share of variance explained, on training batches", "Features active per token (L0)")
    )
    for (name, members), (color, line, _) in zip(curves.items(), _LINES, strict=False):
        if not members:
            continue
        tokens = np.asarray(members[0]["tokens"]) / 1e6
        label = f"{name}, {len(members)} members" if len(members) > 1 else name
        for axes, key in ((upper, "explained_variance"), (lower, "l0")):
            values_MxP = np.array([member[key] for member in members], float)
            axes.plot(tokens, np.median(values_MxP, axis=0), color=color, linestyle=line, label=label)
            if len(members) > 1:
                band = dict(color=color, alpha=0.18, linewidth=0)
                axes.fill_between(tokens, values_MxP.min(axis=0), values_MxP.max(axis=0), **band)
    reached = [value for members in curves.values() for member in members for value in member["explained_variance"]]
    upper.set_ylim(max(np.floor(10 * min(reached, default=0.0)) / 10, 0.0), 1.0)
    lower.set(yscale="log", xlabel="training tokens, millions, repeats counted")
    _plain_log(lower.yaxis)
    for axes in (upper, lower):
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    _legend(lower, 1 if any(len(members) > 1 for members in curves.values()) else 3)
    return figure


def _plain_log(axis: Axis) -> None:
    """Plain numbers at 1, 2, 5, 10, ... on a logarithmic axis."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(lambda value, _: f"{value:,.10g}" if f"{value:.0e}"[0] in "25" else "")


def _log_limits(values: Sequence[float], least: float = 6.0) -> tuple[float, float]:
    """Limits a little beyond the values, and at least this factor apart, so that some ticks have numbers."""
    low, high = min(values, default=1.0) / 1.15, max(values, default=1.0) * 1.15
    widen = max(least * low / high, 1.0) ** 0.5
    return low / widen, high * widen


@_styled
def frontier(members: Mapping[str, Sequence[Sequence[Mapping[str, float | None]]]]) -> Figure:
    """Sparsity against fidelity, on held-out text: the higher and the further left, the better.

    Args:
      members: kind -> for each site its members {"l0", "explained_variance", "ce_recovered"}. A point is a member; the
        line of a site joins those that no other of its members beats in both. Members without L0 or without the
        measure are not drawn.
    """
    titles = ("Share of variance explained", "Cross-entropy recovered, against the mean")
    figure, panels = _panels((2.5, 2.8), titles)
    reached: list[float] = []
    for axes, key in zip(panels, ("explained_variance", "ce_recovered"), strict=True):
        for (name, sites), (color, line, marker) in zip(members.items(), _LINES, strict=False):
            for of_site in sites:
                points_Nx2 = np.array(sorted((m["l0"], m[key]) for m in of_site if m["l0"] and m[key] is not None))
                if not len(points_Nx2):
                    continue
                l0_N, value_N = points_Nx2.T
                best_N = value_N >= np.maximum.accumulate(value_N)
                dots = dict(color=color, marker=marker, markersize=5.5)
                axes.plot(l0_N[best_N], value_N[best_N], linestyle=line, linewidth=1.4, label=name, **dots)
                axes.plot(l0_N[~best_N], value_N[~best_N], linestyle="none", alpha=0.4, **dots)
                reached += l0_N.tolist()
        axes.set_xscale("log")
        axes.set_xlim(*_log_limits(reached))
        _plain_log(axes.xaxis)
        axes.tick_params(axis="x", which="both", length=3, pad=3)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
        axes.grid(color=INK, alpha=0.13, linewidth=0.7)
    panels[1].set_xlabel("features active per token (L0)")
    _legend(panels[1], 3)
    return figure


@_styled
def density(histograms: Mapping[str, Sequence[Mapping]], dense_above: float) -> Figure:
    """On what share of held-out tokens features fire.

    Args:
      histograms: kind -> for each member {"log10_edges": [n + 1] up to 0, "counts": [n], "never": features that never
        fire}, in bins of one width. Of several members the mean is drawn.
      dense_above: the firing rate above which a feature counts as dense, drawn as a line; 0 to 1.
    """
    figure, (axes,) = _panels((2.9,), ("How often each feature fires, on held-out text",))
    reached = []
    for (name, members), (color, line, _) in zip(histograms.items(), _LINES, strict=False):
        edges = np.asarray(max((member["log10_edges"] for member in members), key=len))
        padded = [[0] * (len(edges) - 1 - len(member["counts"])) + list(member["counts"]) for member in members]
        counts = np.mean(padded, axis=0)
        never = np.mean([member["never"] for member in members])
        label = f"{name}{f', mean of {len(members)}' if len(members) > 1 else ''} ({never:,.0f} never fire)"
        axes.stairs(counts, edges, color=color, linestyle=line, linewidth=1.8, label=label)
        axes.stairs(counts, edges, color=color, fill=True, alpha=0.18)
        reached += [*edges[:-1][counts > 0], *edges[1:][counts > 0]]
    if dense_above > 0:
        label = f"dense: above {100 * dense_above:g} %"
        axes.axvline(np.log10(dense_above), color=INK, linewidth=1, linestyle=":", label=label)
    low, high = min(reached, default=-4.0), max(reached, default=0.0)
    decades = np.arange(np.floor(low), np.ceil(high) + 1)
    decades = decades if len(decades) <= 6 else decades[(len(decades) - 1) % 2 :: 2]
    axes.set_xticks(decades, [f"{100 * 10.0**decade:g} %" for decade in decades])
    axes.set_xlim(min(low, decades[0]) - 0.1, max(high, decades[-1]) + 0.1)
    axes.set(xlabel="share of tokens on which the feature fires", ylabel="features", ylim=(0, None))
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    _legend(axes, 1 if any(len(members) > 1 for members in histograms.values()) else 2)
    return figure


@dataclasses.dataclass(frozen=True)
class Effect:
    """What the joint ablation of a behaviour's top features costs, and what each control draw costs.

    Attributes:
      drop: the top features' drop, an interval.
      controls: the drop of each draw of control features.
    """

    drop: Interval
    controls: Sequence[float]


@_styled
def ablation(
    logit_diff: Mapping[str, Effect], accuracy: Mapping[str, Effect], top: int, draws: int, min_accuracy_drop: float
) -> Figure:
    """The joint ablation of the top features against the draws of matched random features.

    Args:
      logit_diff: behaviour -> drop of the logit difference.
      accuracy: behaviour -> drop of the accuracy, a share.
      top: how many features are removed together.
      draws: how many draws of controls.
      min_accuracy_drop: the rule's bound on accuracy, drawn as a line; a share.
    """
    rows = _height(logit_diff, 0.45)
    titles = [f"{lost} lost when {top} features go at once" for lost in ("Logit difference", "Accuracy")]
    figure, (upper, lower) = _panels((rows + 0.75, rows + 1.2), titles)
    many = draws * len(logit_diff) > MANY_POINTS
    for axes, effects, scale in ((upper, logit_diff, 1.0), (lower, accuracy, 100.0)):
        for row, effect in enumerate(effects.values()):
            # The golden ratio spreads the draws evenly over the row's height, the same way every time.
            spread = ((np.arange(len(effect.controls)) * 0.6180339887) % 1 - 0.5) * 0.5
            drops = np.asarray(effect.controls, float) * scale
            label = f"{draws} draws of {top} matched random features"
            dots = dict(color=GREY, alpha=0.55, markersize=3.2, markeredgewidth=0)
            axes.plot(drops, row + spread, "o", rasterized=many, label=label, **dots)
            axes.plot([drops.mean()] * 2, [row - 0.33, row + 0.33], color=INK, label="mean of the draws")
            _point(axes, effect.drop, row, ORANGE, "D", f"the top {top} features (95 % interval)", scale, size=7)
        axes.axvline(0, color=INK, linewidth=0.8)
        _rows(axes, list(effects))
    upper.set_xlabel("logits")
    lower.axvline(100 * min_accuracy_drop, color=INK, linewidth=1, linestyle=":")
    lower.set_xlabel(f"percentage points (dotted: the rule's bound, {100 * min_accuracy_drop:g})")
    _legend(lower, 1)
    return figure


@_styled
def single_features(features: Sequence[int], drops: Sequence[Interval], controls: Sequence[float | None]) -> Figure:
    """What each top feature costs when it is removed alone.

    Args:
      features: their numbers, in the order of their attribution.
      drops: drop of the logit difference of each.
      controls: the mean drop of each one's matched random features; None where there are none.
    """
    figure, (axes,) = _panels((0.19 * len(features) + 1.45,), ("Logit difference lost when one feature is removed",))
    for row, (drop, control) in enumerate(zip(drops, controls, strict=True)):
        _point(axes, drop, row, ORANGE, "o", "the feature (95 % interval)", size=4.5)
        if control is not None:
            axes.plot(
                [control],
                [row],
                "|",
                color=INK,
                markersize=9,
                markeredgewidth=1.8,
                zorder=4,
                label="its matched random features, mean",
            )
    axes.axvline(0, color=INK, linewidth=0.8)
    _rows(axes, [str(feature) for feature in features])
    axes.set_xlabel("logits (each row: the number of a feature)")
    _legend(axes, 1)
    return figure


def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes ``folder/name.png`` (200 dpi) and ``folder/name.svg``, each whole or not at all.

    Returns:
      The SVG's text.
    """
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        with whole_file(folder / f"{name}.png") as beside:
            figure.savefig(beside, format="png", dpi=200, metadata={"Software": None})
        figure.set_layout_engine("none")  # what was laid out for the one serves the other
        text = io.StringIO()
        figure.savefig(text, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    with whole_file(folder / f"{name}.svg") as beside:
        beside.write_text(text.getvalue(), encoding="utf-8")
    return text.getvalue()


def inline(svg: str, name: str, alt: str) -> Markup:
    """The SVG for use inside an HTML page: no paper, the page's ink, ids of its own, and a text for who cannot see it.

    Args:
      svg: what ``save`` returned.
      name: unlike that of any other figure on the page; goes before its ids.
      alt: what the figure shows.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = svg.replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
    svg = re.sub(r"\n\s*", "\n", svg)
    viewed = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">") + 1 :]
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{viewed.group() if viewed else ""} role="img" aria-label="{escape(alt)}">{body}'
    )

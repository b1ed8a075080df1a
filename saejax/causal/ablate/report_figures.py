"""The report's figures of effects: results in, a matplotlib ``Figure`` out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from saejax.causal.ablate.results import CumulativeCurve, DoseCurve
from saejax.page import style
from saejax.page.style import BLUE, GREY, INK, ORANGE, height_of, legend, name_rows, panels, point, styled
from saejax.results import Interval

MANY_POINTS = 300  # above this, a cloud of points is drawn as pixels also in an SVG


class Effect(NamedTuple):
    """What the joint ablation of a behaviour's top features costs, and what each control draw costs."""

    drop: Interval
    controls: Sequence[float]


@styled
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
    rows = height_of(logit_diff, 0.45)
    titles = [f"{lost} lost when {top} features go at once" for lost in ("Logit difference", "Accuracy")]
    figure, (upper, lower) = panels((rows + 0.75, rows + 1.2), titles)
    many = draws * len(logit_diff) > MANY_POINTS
    for axes, effects, scale in ((upper, logit_diff, 1.0), (lower, accuracy, 100.0)):
        for row, effect in enumerate(effects.values()):
            # The golden ratio spreads the draws evenly over the row's height, the same way every time.
            spread = ((np.arange(len(effect.controls)) * 0.6180339887) % 1 - 0.5) * 0.5
            drops = np.asarray(effect.controls, float) * scale
            label = f"up to {draws} draws of {top} matched random features"
            dots = dict(color=GREY, alpha=0.55, markersize=3.2, markeredgewidth=0)
            axes.plot(drops, row + spread, "o", rasterized=many, label=label, **dots)
            axes.plot([drops.mean()] * 2, [row - 0.33, row + 0.33], color=INK, label="mean of the draws")
            point(axes, effect.drop, row, ORANGE, "D", f"the top {top} features (95 % interval)", scale, size=7)
        axes.axvline(0, color=INK, linewidth=0.8)
        name_rows(axes, list(effects))
    upper.set_xlabel("logits")
    lower.axvline(100 * min_accuracy_drop, color=INK, linewidth=1, linestyle=":")
    lower.set_xlabel(f"percentage points (dotted: the rule's bound, {100 * min_accuracy_drop:g})")
    legend(lower, 1)
    return figure


@styled
def single_features(features: Sequence[int], drops: Sequence[Interval], controls: Sequence[float | None]) -> Figure:
    """What each top feature costs when it is removed alone.

    Args:
      features: their numbers, in the order of their attribution.
      drops: drop of the logit difference of each.
      controls: the mean drop of each one's matched random features; None where there are none.
    """
    figure, (axes,) = panels((0.19 * len(features) + 1.45,), ("Logit difference lost when one feature is removed",))
    for row, (drop, control) in enumerate(zip(drops, controls, strict=True)):
        point(axes, drop, row, ORANGE, "o", "the feature (95 % interval)", size=4.5)
        if control is not None:
            axes.plot(
                [control],
                [row],
                "D",
                color=BLUE,  # stands out on the line at zero
                markersize=4.5,
                zorder=4,
                label="its matched random features, mean",
            )
    axes.axvline(0, color=INK, linewidth=0.8)
    name_rows(axes, [str(feature) for feature in features])
    axes.set_xlabel("logits (rows: features, largest attribution first)")
    legend(axes, 1)
    return figure


@styled
def cumulative(curves: Mapping[str, CumulativeCurve]) -> Figure:
    """The logit difference that is left when more and more top features are removed together, a panel per behaviour."""
    figure, all_axes = panels([1.75] * (len(curves) - 1) + [2.25], list(curves))
    for axes, curve in zip(all_axes, curves.values(), strict=True):
        for points, color, dashes, marker, label in (
            (curve.controls, GREY, "--", "s", "as many matched random features, mean of the draws"),
            (curve.top, ORANGE, "-", "o", "the top features, by attribution"),
        ):
            mean, low, high = zip(*((one.mean, one.low, one.high) for one in points.logit_diff), strict=True)
            sizes = points.sizes
            axes.fill_between(sizes, low, high, color=color, alpha=0.22, linewidth=0)
            axes.plot(sizes, mean, linestyle=dashes, color=color, marker=marker, markersize=3.2, label=label)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("logits left")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    all_axes[-1].set_xlabel("features removed together (bands: 95 % intervals)")
    legend(all_axes[-1], 1)
    return figure


@styled
def estimates(estimate_N: np.ndarray, drop_N: np.ndarray, discovered_N: np.ndarray, name: str) -> Figure:
    """The estimated effect of every feature against its measured one; on the dotted line they are equal.

    Args:
      estimate_N: attribution of each of N features, in logits.
      drop_N: by how much the logit difference falls without it.
      discovered_N: bool, whether its effect is a discovery.
      name: of the estimate.
    """
    figure, (axes,) = panels((3.4,), ("Every feature's effect, estimated and measured",))
    many = len(drop_N) > MANY_POINTS
    for chosen_N, color, size, label in (
        (~discovered_N, GREY, 3.0, "not distinguishable from nothing"),
        (discovered_N, ORANGE, 4.2, "q at most 0.05"),
    ):
        dots = dict(color=color, alpha=0.6, markersize=size, markeredgewidth=0)
        label = f"{label} ({int(chosen_N.sum()):,})"
        axes.plot(estimate_N[chosen_N], drop_N[chosen_N], "o", rasterized=many, label=label, **dots)
    reach = np.abs(np.concatenate([estimate_N, drop_N])).max(initial=0.0) or 1.0
    axes.plot([-reach, reach], [-reach, reach], color=INK, linewidth=1, linestyle=":", zorder=1)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set(xlabel=f"estimate ({name}), logits", ylabel="logit difference lost")
    decade = 10.0 ** np.floor(np.log10(reach))
    largest = 3 * decade if reach >= 3 * decade else decade
    ticks = [-largest, -largest / 10, 0.0, largest / 10, largest]
    for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        set_scale("symlog", linthresh=reach / 30)
        axis.set_ticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
        axis.set_minor_locator(NullLocator())
    legend(axes, 1)
    return figure


@styled
def doses(compared: Mapping[str, Mapping[str, DoseCurve]]) -> Figure:
    """What growing sets of each basis's top directions cost against the norm of the change, a panel for each behaviour.

    Args:
      compared: behaviour -> basis, in words -> its curve.
    """
    figure, below = panels(
        [1.75] * (len(compared) - 1) + [2.6], [f"{name}: logit difference lost" for name in compared]
    )
    for axes, curves in zip(below, compared.values(), strict=True):
        for (color, dashes, marker), (name, curve) in zip(style.LINES, curves.items(), strict=False):
            order = np.argsort(curve.dose)
            dose, drop = ([0.0, *np.asarray(values)[order]] for values in (curve.dose, curve.logit_diff_drop))
            axes.plot(dose, drop, linestyle=dashes, color=color, marker=marker, markersize=3.2, label=name)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("logits lost")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("dose: norm of the change at the site")
    legend(below[-1], 1)
    return figure

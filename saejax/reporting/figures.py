"""The report's figures of behaviours, effects, probes: plain data in, a matplotlib ``Figure`` out for ``style.save``.

An interval is a mapping ``{"mean", "low", "high"}``; all intervals shown are 95 % intervals.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from saejax.reporting.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    Interval,
    error_lengths,
    height_of,
    legend,
    name_rows,
    panels,
    point,
    styled,
)

MANY_POINTS = 300  # above this, a cloud of points is drawn as pixels also in an SVG


@styled
def baselines(scores: Mapping[str, Mapping[str, Mapping[str, Interval]]], min_accuracy: float) -> Figure:
    """What the model can do: accuracy and logit difference of each behaviour.

    Args:
      scores: behaviour -> split ("test", "train") -> {"accuracy", "logit_diff"} intervals.
      min_accuracy: the accuracy below which a behaviour is flagged, drawn as a line; 0 to 1.
    """
    rows = height_of(scores, 0.36)
    figure, (left, right) = panels(
        (rows + 0.75, rows + 1.0),
        ("Accuracy: correct answer above the wrong one", "Logit of the correct minus the wrong answer"),
    )
    for row, splits in enumerate(scores.values()):
        for shift, (split, color, marker) in zip(
            (-0.14, 0.14), (("test", BLUE, "o"), ("train", GREY, "s")), strict=True
        ):
            label = f"{split} prompts, with 95 % interval"
            point(left, splits[split]["accuracy"], row + shift, color, marker, label, scale=100)
            point(right, splits[split]["logit_diff"], row + shift, color, marker, label)
    left.axvline(100 * min_accuracy, color=INK, linewidth=1, linestyle=":")
    left.set(
        xlabel=f"% of prompts (dotted: flagged below {100 * min_accuracy:.0f} %)",
        xlim=(min(left.get_xlim()[0], 45), 102),
    )
    right.axvline(0, color=INK, linewidth=1)
    right.set_xlabel("logits")
    for axes in (left, right):
        name_rows(axes, list(scores))
    legend(right, 1)
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
            label = f"{draws} draws of {top} matched random features"
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
def cumulative(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The logit difference that is left when more and more top features are removed together, a panel per behaviour.

    Args:
      curves: behaviour -> {"top" and "controls": {"sizes": S numbers, "logit_diff": S intervals}}.
    """
    figure, all_axes = panels([1.75] * (len(curves) - 1) + [2.25], list(curves))
    for axes, curve in zip(all_axes, curves.values(), strict=True):
        for kind, color, dashes, marker, label in (
            ("controls", GREY, "--", "s", "as many matched random features, mean of the draws"),
            ("top", ORANGE, "-", "o", "the top features, by attribution"),
        ):
            mean, low, high = ([value[key] for value in curve[kind]["logit_diff"]] for key in ("mean", "low", "high"))
            sizes = curve[kind]["sizes"]
            axes.fill_between(sizes, low, high, color=color, alpha=0.22, linewidth=0)
            axes.plot(sizes, mean, dashes, color=color, marker=marker, markersize=3.2, label=label)
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
def probes(labels: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """How well labels are read off features and raw activations, by how many of them a probe sees.

    Args:
      labels: title -> its probes, each {"input" ("features" or "raw"), "k" (None: all), "accuracy" and "shuffled"
        (intervals), "majority"}; shares. Those of an input stand in order of k.
    """
    heights = [1.45 + 1.0 / len(labels)] * len(labels)  # the legend takes an inch
    figure, below = panels(heights, list(labels))
    looks = dict(features=(ORANGE, "o", -0.07, "features"), raw=(BLUE, "s", 0.07, "raw dimensions"))
    for axes, rows in zip(below, labels.values(), strict=True):
        sizes = [row["k"] for row in rows if row["input"] == rows[0]["input"]]
        low_K, high_K = (
            [100 * pick(row["shuffled"][end] for row in rows if row["k"] == k) for k in sizes]
            for pick, end in ((min, "low"), (max, "high"))
        )
        places = np.arange(len(sizes))
        axes.fill_between(places, low_K, high_K, color=GREY, alpha=0.25, linewidth=0, label="shuffled labels")
        axes.axhline(100 * rows[0]["majority"], color=INK, linewidth=1, linestyle=":", label="largest class")
        for name, (color, marker, shift, label) in looks.items():
            accuracies = [row["accuracy"] for row in rows if row["input"] == name]
            lengths_2xK = np.hstack([error_lengths(accuracy, 100) for accuracy in accuracies])
            axes.errorbar(
                places + shift,
                [100 * accuracy["mean"] for accuracy in accuracies],
                yerr=lengths_2xK,
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.2,
                elinewidth=1.2,
                capsize=2,
                label=f"{label}, with 95 % interval",
            )
        axes.set_xticks(places, [str(k or "all") for k in sizes])
        axes.set(ylim=(-7, 107), yticks=(0, 50, 100), ylabel="%")
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("features, or dimensions, that a probe sees")
    legend(below[-1], 1)
    return figure

"""The figures of a study's report."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from saejax.matching.transfer.report import draw_heatmaps
from saejax.page.style import BLUE, GREEN, GREY, INK, LINES, ORANGE, height_of, legend, name_rows, panels, point, styled
from saejax.results import Interval
from saejax.studies.results import (
    AlignmentFigures,
    DictionaryFigures,
    DriverFigures,
    EffectFigures,
    PrimitiveFigures,
)


@styled
def draw_effects(effects: Sequence[EffectFigures]) -> Figure:
    """Draw what ablating the top features costs in each row, beside random and placebo sets at equal dose."""
    names = [f"{effect.row}, {effect.benchmark}" for effect in effects]
    figure, (axes,) = panels((height_of(names, 0.5) + 1.5,), ("Log-likelihood of the answers lost under ablation",))
    for row, effect in enumerate(effects):
        if effect.nats_drop:
            point(axes, effect.nats_drop, row, ORANGE, "D", "top features, with their 95 % interval", size=5)
        _draw_controls(axes, row + 0.22, effect.random_nats, effect.placebo_nats)
    _finish_nats_axes(axes, names)
    return figure


@styled
def draw_drivers(drivers: Sequence[DriverFigures]) -> Figure:
    """Draw the share of features that fire on injected tokens alone, by row, benchmark and group of features."""
    names = [f"{shares.row}, {shares.benchmark}: {shares.group}" for shares in drivers]
    figure, (axes,) = panels((height_of(names, 0.3) + 1.2,), ("Features that fire on words alone",))
    colors = {"tested": ORANGE, "random features": GREY, "random dictionary": BLUE}
    for row, shares in enumerate(drivers):
        share: Interval = shares.tokens
        point(axes, share, row, colors.get(shares.group, INK), "o", f"{shares.group}, with the 95 % interval", 100, 5)
    name_rows(axes, names)
    axes.set_xlim(-3, 103 * max(1.0, *(shares.tokens.high for shares in drivers)))
    axes.set_xlabel("% of the features of a group")
    legend(axes, 1)
    return figure


@styled
def draw_losses(dictionaries: Sequence[DictionaryFigures]) -> Figure:
    """Draw the training loss of every dictionary by epoch, a colour for each row."""
    figure, (axes,) = panels((2.6,), ("Training loss, as a share of the first epoch's",))
    rows = list(dict.fromkeys(dictionary.row for dictionary in dictionaries))
    for dictionary in dictionaries:
        color, dashes, marker = LINES[rows.index(dictionary.row) % len(LINES)]
        if dictionary.losses and dictionary.losses[0]:
            share = [loss / dictionary.losses[0] for loss in dictionary.losses]
            axes.plot(
                range(1, len(share) + 1),
                share,
                linestyle=dashes,
                marker=marker,
                markersize=3,
                color=color,
                label=dictionary.row,
            )
    axes.set(xlabel="epoch", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    legend(axes, 1)
    return figure


@styled
def draw_primitives(primitives: Sequence[PrimitiveFigures]) -> Figure:
    """Draw what ablating each group costs the items of its category and others, beside control sets."""
    names = [f"{primitive.row}: {primitive.name or 'no category'}" for primitive in primitives]
    figure, (axes,) = panels((height_of(names, 0.42) + 1.5,), ("Log-likelihood lost when a group is ablated",))
    for row, primitive in enumerate(primitives):
        if primitive.effect:
            point(axes, primitive.effect, row - 0.12, ORANGE, "D", "on items of its category", size=5)
        if primitive.elsewhere:
            point(axes, primitive.elsewhere, row + 0.12, GREEN, "s", "on other items", size=5)
        _draw_controls(axes, row + 0.3, primitive.random, primitive.placebo)
    _finish_nats_axes(axes, names)
    return figure


@styled
def draw_models(rows: Sequence[str], alignment: Sequence[AlignmentFigures]) -> Figure:
    """Draw the share of features that two rows share by activity on a benchmark, and the same by chance."""
    matrices = {}
    for title, field in (("Features with a partner", "shared"), ("By chance", "shared_null")):
        share_NxN = np.full((len(rows), len(rows)), np.nan)
        for pair in alignment:
            value = getattr(pair, field)
            if value is not None:
                first, second = rows.index(pair.first), rows.index(pair.second)
                share_NxN[first, second] = share_NxN[second, first] = value
        matrices[title] = share_NxN
    return draw_heatmaps(rows, matrices, "share of the first row's features")


@styled
def draw_trends(dictionaries: Sequence[DictionaryFigures], widths: Mapping[str, int]) -> Figure:
    """Draw the explained variance of every dictionary against the model's width and its expansion, a colour a row."""
    figure, below = panels((2.3, 2.3), ("Normalised error by width of the stream", "Normalised error by expansion"))
    rows = list(dict.fromkeys(dictionary.row for dictionary in dictionaries))
    for dictionary in dictionaries:
        if dictionary.row in widths:
            color, _, marker = LINES[rows.index(dictionary.row) % len(LINES)]
            width, error = widths[dictionary.row], 1 - dictionary.explained_variance
            for axes, x in zip(below, (width, dictionary.features / width), strict=True):
                axes.plot([x], [error], marker, color=color, markersize=5, label=dictionary.row)
    for axes, label in zip(below, ("width of the stream", "features per dimension"), strict=True):
        axes.set(xlabel=label, ylim=(0, None))
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    legend(below[-1], 1)
    return figure


def _draw_controls(axes: Axes, y: float, random: float | None, placebo: float | None) -> None:
    """Draw the mean effects of both kinds of control sets, in nats; one that was not measured is left out.

    Args:
      axes: to draw on.
      y: height of the points.
      random: effect of random sets at equal dose.
      placebo: effect of sets chosen for other answers at equal dose.
    """
    for value, color, marker, label in (
        (random, GREY, "o", "random sets at equal dose, mean"),
        (placebo, BLUE, "x", "sets chosen for other answers at equal dose, mean"),
    ):
        if value is not None:
            axes.plot([value], [y], marker, color=color, label=label, markersize=5)


def _finish_nats_axes(axes: Axes, names: Sequence[str]) -> None:
    """Add the line of no effect, the names of the rows, the unit and the legend."""
    axes.axvline(0, color=INK, linewidth=0.8)
    name_rows(axes, names)
    axes.set_xlabel("nats per answer")
    legend(axes, 1)

"""The figures of a study's report."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from saejax.page.style import BLUE, GREEN, GREY, INK, LINES, ORANGE, height_of, legend, name_rows, panels, point, styled
from saejax.results import Interval
from saejax.stages.transfer.report import draw_heatmaps
from saejax.studies.results import AlignmentFigures, DictionaryFigures, DriverFigures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def draw_drops(
    title: str,
    names: Sequence[str],
    drops: Sequence[Mapping[str, Interval | None]],
    controls: Sequence[Mapping[str, float | None]],
) -> "Figure":
    """Draw what ablation costs, in nats per answer, beside control sets at equal dose.

    Args:
      title: of the figure.
      names: of the rows.
      drops: of each row, one or two by what they are; None is left out.
      controls: of each row the means under two kinds of control sets, by their names; None is left out.
    """
    figure, (axes,) = panels((height_of(names, 0.5) + 1.5,), (title,))
    for place, (of_row, means) in enumerate(zip(drops, controls, strict=True)):
        for number, (label, drop) in enumerate(of_row.items()):
            if drop:
                y = place + 0.24 * (number - (len(of_row) - 1) / 2)
                point(axes, drop, y, (ORANGE, GREEN)[number], "Ds"[number], label, size=5)
        for (kind, mean), color, marker in zip(means.items(), (GREY, BLUE), "ox", strict=True):
            if mean is not None:
                label = f"{kind} at equal dose, mean"
                axes.plot([mean], [place + 0.3], marker, color=color, label=label, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    name_rows(axes, names)
    axes.set_xlabel("nats per answer")
    legend(axes, 1)
    return figure


@styled
def draw_drivers(drivers: Sequence[DriverFigures]) -> "Figure":
    """Draw the share of features that fire on injected tokens alone, by row, benchmark and group of features."""
    names = [f"{shares.row}, {shares.benchmark}: {shares.group}" for shares in drivers]
    figure, (axes,) = panels((height_of(names, 0.3) + 1.2,), ("Features that fire on words alone",))
    colors = {"tested": ORANGE, "random features": GREY, "random dictionary": BLUE}
    for place, shares in enumerate(drivers):
        share: Interval = shares.tokens
        point(axes, share, place, colors.get(shares.group, INK), "o", f"{shares.group}, with the 95 % interval", 100, 5)
    name_rows(axes, names)
    axes.set_xlim(-3, 103 * max(1.0, *(shares.tokens.high for shares in drivers)))
    axes.set_xlabel("% of the features of a group")
    legend(axes, 1)
    return figure


@styled
def draw_models(rows: Sequence[str], alignment: Sequence[AlignmentFigures]) -> "Figure":
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
def draw_trends(dictionaries: Sequence[DictionaryFigures], widths: Mapping[str, int]) -> "Figure":
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

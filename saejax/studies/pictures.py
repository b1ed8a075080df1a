"""The figures of a study's report."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from saejax.page.style import BLUE, GREY, INK, ORANGE, height_of, legend, name_rows, panels, point, styled
from saejax.results import Interval
from saejax.studies.results import DriverFigures, EffectFigures


@styled
def draw_effects(effects: Sequence[EffectFigures]) -> Figure:
    """Draw what ablating the top features costs in each row, beside random and placebo sets at equal dose."""
    names = [f"{one.row}, {one.benchmark}" for one in effects]
    figure, (axes,) = panels((height_of(names, 0.36) + 1.2,), ("Log-likelihood of the answers lost under ablation",))
    for row, one in enumerate(effects):
        if one.nats_drop:
            point(axes, one.nats_drop, row, ORANGE, "D", "top features, with their 95 % interval", size=5)
        for value, color, marker, label in (
            (one.random_nats, GREY, "o", "random sets at equal dose, mean"),
            (one.placebo_nats, BLUE, "x", "sets chosen for other answers at equal dose, mean"),
        ):
            if value is not None:
                axes.plot([value], [row + 0.22], marker, color=color, label=label, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    name_rows(axes, names)
    axes.set_xlabel("nats per answer")
    legend(axes, 1)
    return figure


@styled
def draw_drivers(drivers: Sequence[DriverFigures]) -> Figure:
    """Draw the share of features that fire on injected tokens alone, by row, benchmark and group of features."""
    names = [f"{one.row}, {one.benchmark}: {one.group}" for one in drivers]
    figure, (axes,) = panels((height_of(names, 0.3) + 1.2,), ("Features that fire on words alone",))
    colors = {"tested": ORANGE, "random features": GREY, "random dictionary": BLUE}
    for row, one in enumerate(drivers):
        share: Interval = one.tokens
        point(axes, share, row, colors.get(one.group, INK), "o", f"{one.group}, with the 95 % interval", 100, 5)
    name_rows(axes, names)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("% of the features of a group")
    legend(axes, 1)
    return figure

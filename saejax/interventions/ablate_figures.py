"""The figure of the ablation report: effect against dose."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from saejax.interventions.answers import BASIS_NAMES
from saejax.interventions.curves import EffectCurve
from saejax.page import style
from saejax.page.style import BLUE, GREY, INK, ORANGE, legend, panels, styled
from saejax.results import Interval

_STYLES = (  # colours and dashes of bases; those that need no folder have the same ones in all figures
    (style.GREEN, "--"),
    (style.VIOLET, "-."),
    (style.OCHRE, ":"),
    (style.PINK, (0, (8, 2))),
    (INK, (0, (3, 1))),
)


@styled
def dose_effect(
    title: str,
    top: EffectCurve,
    effect: Interval,
    random: Sequence[EffectCurve],
    placebo: Sequence[EffectCurve],
    bases: Mapping[str, EffectCurve],
    unit: str = "logit difference lost",
) -> Figure:
    """Draw the effects of the top features, random sets, placebo sets and other bases against their doses.

    Args:
      title: the behaviour.
      top: the top features.
      effect: their effect at full dose.
      random: the random sets; each is a point at the smaller of its dose and that of the top features.
      placebo: the placebo sets, likewise.
      bases: the other bases by name, each drawn up to the dose of the top features.
      unit: the effect in words.
    """
    figure, (axes,) = panels((4.1,), (title,))
    k = len(top.edits[-1].features)
    label = f"the {k} top features, ablated by growing fractions"
    axes.plot(top.dose_A, top.drop_AxP.mean(axis=1), "-D", color=ORANGE, markersize=4.5, zorder=4, label=label)
    axes.errorbar(
        [top.dose_A[-1]], [effect.mean], yerr=style.error_lengths(effect), color=ORANGE, capsize=3, elinewidth=1.8
    )
    for curves, color, marker, name in (
        (random, GREY, "o", "random sets"),
        (placebo, BLUE, "x", "placebo sets: top features for unrelated tokens"),
    ):
        if curves:
            dose_N = np.array([min(curve.reach, top.reach) for curve in curves])
            drop_N = np.array([curve.drop_at(dose)[0].mean() for curve, dose in zip(curves, dose_N, strict=True)])
            axes.plot(
                dose_N, drop_N, marker, color=color, markersize=4.2, alpha=0.75, zorder=2, label=f"{len(curves)} {name}"
            )
    # A folder's basis comes after those that any figure may have.
    order = dict.fromkeys([*BASIS_NAMES.values(), *bases])
    styles = dict(zip(order, itertools.cycle(_STYLES), strict=False))
    for name, curve in bases.items():
        color, dashes = styles[name]
        # Up to the dose of the top features: nothing is compared beyond it.
        inside = curve.dose_A < top.reach
        end = min(curve.reach, top.reach)
        doses = [*curve.dose_A[inside], end]
        drops = [*curve.drop_AxP[inside].mean(axis=1), float(curve.drop_at(end)[0].mean())]
        axes.plot(doses, drops, linestyle=dashes, color=color, linewidth=1.6, zorder=3, label=name)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="dose: norm of the change at the site", ylabel=unit)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    legend(axes, 1)
    return figure

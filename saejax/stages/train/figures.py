"""The report's figures of dictionaries: plain data in, a matplotlib ``Figure`` out."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from saejax.evaluation.results import DENSE_ABOVE, DensityHistogram, DictionaryScores
from saejax.page.style import INK, LINES, legend, log_limits, panels, plain_log, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
    """A member's training; P points."""

    tokens: Sequence[float]  #: seen, repeats counted
    explained_variance: Sequence[float]  #: of the batch
    l0: Sequence[float]  #: features active per token


@styled
def training(curves: Mapping[str, Sequence[TrainingCurve]]) -> "Figure":
    """Plot the training curves: explained variance and L0 on training batches.

    Args:
      curves: kind -> of each member; none if there is no record. Of several members the median is drawn, and a band
        from the least to the greatest, of the members trained so far: members may have other points.
    """
    figure, (upper, lower) = panels(
        (2.0, 2.3), ("Share of variance explained, on training batches", "Features active per token (L0)")
    )
    for (name, members), (color, line, _) in zip(curves.items(), itertools.cycle(LINES), strict=False):
        if not members:
            continue
        longest = max(members, key=lambda member: (member.tokens[-1], len(member.tokens)))
        tokens = np.asarray(longest.tokens) / 1e6
        label = f"{name}, {len(members)} members" if len(members) > 1 else name
        for axes, key in ((upper, "explained_variance"), (lower, "l0")):
            values_MxP = np.stack(
                [np.interp(longest.tokens, member.tokens, getattr(member, key), np.nan, np.nan) for member in members]
            )
            axes.plot(tokens, np.nanmedian(values_MxP, axis=0), color=color, linestyle=line, label=label)
            if len(members) > 1:
                band = dict(color=color, alpha=0.18, linewidth=0)
                axes.fill_between(tokens, np.nanmin(values_MxP, axis=0), np.nanmax(values_MxP, axis=0), **band)
    reached = [value for members in curves.values() for member in members for value in member.explained_variance]
    upper.set_ylim(max(np.floor(10 * min(reached, default=0.0)) / 10, 0.0), 1.0)
    lower.set(yscale="log", xlabel="training tokens, millions, repeats counted")
    plain_log(lower.yaxis)
    for axes in (upper, lower):
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    legend(lower, 1 if any(len(members) > 1 for members in curves.values()) else 3)
    return figure


@styled
def frontier(members: Mapping[str, Sequence[Sequence[DictionaryScores]]]) -> "Figure":
    """Sparsity against fidelity, on held-out text: the higher and the further left, the better.

    Args:
      members: kind -> for each site its members. A point is a member; the line of a site joins those that no other of
        its members beats in both. Members without L0 or without the measure are not drawn.
    """
    titles = ("Share of variance explained", "Cross-entropy recovered, against the mean")
    figure, below = panels((2.5, 2.8), titles)
    reached: list[float] = []
    for axes, key in zip(below, ("explained_variance", "ce_recovered_mean"), strict=True):
        for (name, sites), (color, line, marker) in zip(members.items(), itertools.cycle(LINES), strict=False):
            for of_site in sites:
                points = sorted((m.l0, getattr(m, key)) for m in of_site if m.l0 and getattr(m, key) is not None)
                points_Nx2 = np.array(points).reshape(-1, 2)
                if not len(points_Nx2):
                    continue
                l0_N, value_N = points_Nx2.T
                best_N = value_N >= np.maximum.accumulate(value_N)
                dots = dict(color=color, marker=marker, markersize=5.5)
                axes.plot(l0_N[best_N], value_N[best_N], linestyle=line, linewidth=1.4, label=name, **dots)
                axes.plot(l0_N[~best_N], value_N[~best_N], linestyle="none", alpha=0.4, **dots)
                reached += l0_N.tolist()
        axes.set_xscale("log")
        axes.set_xlim(*log_limits(reached))
        plain_log(axes.xaxis)
        axes.tick_params(axis="x", which="both", length=3, pad=3)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
        axes.grid(color=INK, alpha=0.13, linewidth=0.7)
    below[1].set_xlabel("features active per token (L0)")
    legend(below[1], 3)
    return figure


@styled
def density(histograms: Mapping[str, Sequence[DensityHistogram]]) -> "Figure":
    """On what share of held-out tokens features fire.

    Args:
      histograms: kind -> of each member, in bins of one width. Of several members the mean is drawn.
    """
    figure, (axes,) = panels((2.9,), ("How often each feature fires, on held-out text",))
    reached = []
    for (name, members), (color, line, _) in zip(histograms.items(), itertools.cycle(LINES), strict=False):
        edges = np.asarray(max((member.log10_edges for member in members), key=len))
        padded = [[0] * (len(edges) - 1 - len(member.counts)) + list(member.counts) for member in members]
        counts = np.mean(padded, axis=0)
        never = np.mean([member.never for member in members])
        label = f"{name}{f', mean of {len(members)}' if len(members) > 1 else ''} ({never:,.0f} never fire)"
        axes.stairs(counts, edges, color=color, linestyle=line, linewidth=1.8, label=label)
        axes.stairs(counts, edges, color=color, fill=True, alpha=0.18)
        reached += [*edges[:-1][counts > 0], *edges[1:][counts > 0]]
    label = f"dense: above {100 * DENSE_ABOVE:g} %"
    axes.axvline(np.log10(DENSE_ABOVE), color=INK, linewidth=1, linestyle=":", label=label)
    low, high = min(reached, default=-4.0), max(reached, default=0.0)
    decades = np.arange(np.floor(low), np.ceil(high) + 1)
    decades = decades if len(decades) <= 6 else decades[(len(decades) - 1) % 2 :: 2]
    axes.set_xticks(decades, [f"{100 * 10.0**decade:g} %" for decade in decades])
    axes.set_xlim(min(low, decades[0]) - 0.1, max(high, decades[-1]) + 0.1)
    axes.set(xlabel="share of tokens on which the feature fires", ylabel="features", ylim=(0, None))
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.7)
    legend(axes, 1 if any(len(members) > 1 for members in histograms.values()) else 2)
    return figure

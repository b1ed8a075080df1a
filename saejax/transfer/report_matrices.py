"""Figures of dictionaries by dictionaries, in the report on what they share."""

from collections.abc import Callable, Sequence
from pathlib import PurePath

import numpy as np
from matplotlib.figure import Figure

from saejax.page import style
from saejax.transfer.results import ComparedPair


def short(name: str) -> str:
    """A dictionary's name; of a folder the last parts."""
    return name if len(name) <= 24 else "/".join(PurePath(name).parts[-2:])


ROWS = 15  # pairs or dictionaries of a table; more are drawn


def matrix(
    names: Sequence[str], pairs: Sequence[ComparedPair], value: Callable[[ComparedPair], tuple[float, float]]
) -> np.ndarray:
    """[N, N]: of the row's dictionary and the column's; NaN on the diagonal."""
    found = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        first, second = names.index(pair.first), names.index(pair.second)
        found[first, second], found[second, first] = value(pair)
    return found


@style.styled
def heatmaps(names: Sequence[str], matrices: dict[str, np.ndarray], most: float, label: str) -> Figure:
    """Matrices of dictionaries by dictionaries, one below the other on one scale up to ``most``, with a ``label``."""
    side = 3.3 + 0.25
    figure, below = style.panels([side] * len(matrices), list(matrices))
    step = -(-len(names) // 12)
    ticks = range(0, len(names), step)
    for axes, values in zip(below, matrices.values(), strict=True):
        image = axes.imshow(values, cmap="viridis", vmin=0.0, vmax=most, interpolation="nearest")
        axes.set_xticks(ticks, [_tick(names[i]) for i in ticks], rotation=90, size=7.5)
        axes.set_yticks(ticks, [_tick(names[i]) for i in ticks], size=7.5)
    figure.colorbar(image, ax=below, shrink=0.6, aspect=30, label=label)
    return figure


def _tick(name: str) -> str:
    shown = short(name).rpartition("/")[2] or name
    return shown if len(shown) <= 16 else "…" + shown[-15:]

"""The look of the report's figures, and the small pieces that they share.

Figures are 4.4 inches wide with 9 to 10 point text, so that they read at their own size in the 360 pixels of
a phone. Colours are Okabe and Ito's, which colour-blind readers tell apart and which stand out on white as on
dark grey; shapes differ as well. Everything that is ink (text, axes) has the one colour ``INK``, which
``inline`` hands to the page, so that a dark page shows light ink. The same data give the same bytes.
"""

import functools
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from markupsafe import Markup, escape

from saejax.files import whole_file
from saejax.results import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK, PAPER = "#1b1f24", "#ffffff"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#b8628f", "#7f7f7f"
VIOLET, OCHRE = "#7a5cc4", "#a07800"
_WIDTH = 4.4  # inches
LINES: tuple[tuple[str, Any, str], ...] = (
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
    "text.parse_math": False,  # dollar signs in names and tokens begin no formula
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
}


def styled(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """Make a function draw with this module's style, whatever the caller has set."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        import matplotlib

        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
            return draw(*args, **kwargs)

    return drawn


def drawable(text: str) -> str:
    """Return a text in which numbers as Python writes them stand for characters that the figures' font lacks.

    The font would show the same box for all of them.
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_STYLE["font.family"]))
    return "".join(char if font.get_char_index(ord(char)) else ascii(char)[1:-1] for char in text)


def panels(heights: Sequence[float], titles: Sequence[str]) -> "tuple[Figure, list[Axes]]":
    """Return a figure of panels one below the other, titles at the figure's left edge, heights in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(_WIDTH, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.07, hspace=0.04))
    columns = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, title in zip(columns, titles, strict=True):
        text = textwrap.fill(title, 50)
        # A blank title of the axes keeps the room; the text itself starts further left than the axes.
        axes.set_title("\n".join(" " for _ in text.splitlines()))
        axes.annotate(
            text, (0.012, 1), (0, 6), ("figure fraction", "axes fraction"), "offset points", weight="bold", size=10
        ).set_in_layout(False)
    return figure, list(columns)


def error_lengths(value: Interval, scale: float = 1.0) -> np.ndarray:
    """Return the lengths of the error bar below and above the mean, [2, 1], never negative."""
    mean, low, high = (bound * scale for bound in (value.mean, value.low, value.high))
    return np.array([[max(mean - low, 0.0)], [max(high - mean, 0.0)]])


def name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Name the rows from the top down, and draw a grid across them."""
    from matplotlib.ticker import MaxNLocator

    axes.set_yticks(range(len(names)), [textwrap.fill(name, 16) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.7)


def height_of(names: Iterable[str], least: float) -> float:
    """Return the inches that rows of these names take, at least ``least`` each."""
    names = list(names)
    lines = max(len(textwrap.wrap(name, 16)) for name in names)
    return len(names) * max(least, 0.05 + 0.155 * lines)


def point(axes: "Axes", value: Interval, y: float, color: str, marker: str, label: str, scale: float = 1.0, size=6.0):
    """Draw an interval and its mean as a marker with a horizontal bar at height ``y``."""
    axes.errorbar(
        [value.mean * scale], [y], xerr=error_lengths(value, scale), fmt=marker, color=color, markersize=size,
        elinewidth=1.8, capsize=3, label=label, zorder=3,
    )  # fmt: skip


def legend(axes: "Axes", columns: int) -> None:
    """Put a legend below the axes that names each label once."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=columns, handlelength=1.6)


def plain_log(axis: "Axis") -> None:
    """Write plain numbers at 1, 2, 5, 10, ... on a logarithmic axis."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(lambda value, _: f"{value:,.10g}" if f"{value:.0e}"[0] in "25" else "")


def log_limits(values: Sequence[float]) -> tuple[float, float]:
    """Return limits a little beyond the values, and at least a factor of 6 apart, so that some ticks have numbers."""
    low, high = min(values, default=1.0) / 1.15, max(values, default=1.0) * 1.15
    widen = max(6.0 * low / high, 1.0) ** 0.5
    return low / widen, high * widen


def save(figure: "Figure", folder: Path, name: str) -> str:
    """Write ``folder/name.png`` (200 dpi) and ``folder/name.svg``, each whole or not at all.

    Returns:
      The SVG's text.
    """
    import matplotlib

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        with whole_file(folder / f"{name}.png") as path:
            figure.savefig(path, format="png", dpi=200, metadata={"Software": None})
        figure.set_layout_engine("none")  # the SVG keeps the layout of the PNG
        text = io.StringIO()
        figure.savefig(text, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    with whole_file(folder / f"{name}.svg") as path:
        path.write_text(text.getvalue(), encoding="utf-8")
    return text.getvalue()


def inline(svg: str, name: str, alt: str, colours: Mapping[str, str] | None = None) -> Markup:
    """Return the SVG for use inside an HTML page.

    The background is transparent, ink takes the page's text colour, ids are unique on the page, and a text stands in
    for readers who cannot see the figure.

    Args:
      svg: the text that ``save`` returned.
      name: name of the figure, unique on the page; it prefixes the ids.
      alt: text that says what the figure shows.
      colours: colours of the figure -> names of the page's CSS variables that replace them; None: no other colour is
        replaced.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for colour, variable in (colours or {}).items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
    svg = re.sub(r"\n\s*", "\n", svg)
    viewed = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">") + 1 :]
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{viewed.group() if viewed else ""} role="img" aria-label="{escape(alt)}">{body}'
    )

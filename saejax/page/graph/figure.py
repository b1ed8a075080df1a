"""A figure of an attribution graph for print: its most influential nodes, layers by positions, and the edges between.

Edges into a node are as wide as the share that they have of its input, by size; blue ones excite, orange ones inhibit.
"""

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saejax.attribution.graph.data import ERROR, FEATURE, LOGIT, TOKEN, GraphData
from saejax.errors import UserError
from saejax.files import whole_file
from saejax.page.style import BLUE, GREY, INK, ORANGE, PAPER, drawable, styled
from saejax.unicode import visible, visible_token

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf", "png")
_LEAST_SHARE = 0.02  # of a target's input: edges with less are not drawn
_NAME = 22  # characters of a name
_MARKS = {FEATURE: "o", ERROR: "D", TOKEN: "s", LOGIT: "s"}


def save_figure(path: Path, graph: GraphData, labels: Mapping[tuple[int, int], str] | None, nodes: int) -> None:
    """Write the figure of a pruned graph; see ``Graph.save_figure``."""
    suffix = path.suffix[1:].lower()
    if suffix not in FORMATS:
        raise UserError(f"{path} is no figure's file: expected a name that ends in .svg, .pdf or .png")
    if not isinstance(nodes, Integral) or nodes < 0:
        raise UserError(f"nodes is {nodes!r}: expected a number of features and errors, 0 or above")
    _write(draw_graph(graph, labels or {}, nodes), path, suffix)


@styled
def _write(figure: "Figure", path: Path, suffix: str) -> "Figure":
    dates = dict(svg={"Date": None, "Creator": None}, pdf={"CreationDate": None, "Creator": None, "Producer": None})
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=300, metadata=dates.get(suffix))
    return figure


@styled
def draw_graph(graph: GraphData, labels: Mapping[tuple[int, int], str], nodes: int = 40) -> "Figure":
    """Return the figure of a pruned graph.

    Args:
      graph: the pruned graph.
      labels: (layer, feature) -> what the feature is called; others are called by their number.
      nodes: maximum number of features and errors, the most influential ones; all tokens and logits are drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.patheffects import withStroke

    assert graph.pruning
    table = graph.nodes
    inner = np.flatnonzero(np.isin(table.kind_N, (FEATURE, ERROR)))
    inner = inner[np.argsort(graph.pruning.influence_N[inner], kind="stable")[:nodes]]  # shares are cumulative
    drawn = np.sort(np.concatenate([inner, np.flatnonzero(np.isin(table.kind_N, (TOKEN, LOGIT)))]))
    # Layers without nodes have no row.
    row_N = np.searchsorted(np.unique(table.layer_N[drawn]), table.layer_N)
    rows, positions = int(row_N[drawn].max()) + 1, len(graph.tokens)
    x_N, y_N = table.position_N.astype(float), row_N.astype(float)
    for cell in np.unique(np.stack([row_N[drawn], table.position_N[drawn]]), axis=1).T:
        here = drawn[(row_N[drawn] == cell[0]) & (table.position_N[drawn] == cell[1])]
        x_N[here] += (np.arange(len(here)) - (len(here) - 1) / 2) * 0.8 / max(len(here), 3)
        y_N[here] += 0.22 * (np.arange(len(here)) % 2) * (len(here) > 3)  # names of neighbours stand apart

    figure = Figure(
        figsize=(min(max(0.75 * positions + 0.8, 4.4), 12), min(0.45 * rows + 0.8, 10)), layout="constrained"
    )
    axes = figure.subplots()
    source_E, target_E, weight_E = graph.edges()
    size_N = np.bincount(target_E, np.abs(weight_E), len(table))
    share_E = np.abs(weight_E) / np.where(size_N > 0, size_N, 1)[target_E]
    is_drawn_E = np.isin(source_E, drawn) & np.isin(target_E, drawn) & (share_E >= _LEAST_SHARE)
    for edge in np.flatnonzero(is_drawn_E)[np.argsort(share_E[is_drawn_E], kind="stable")]:
        ends = [(x_N[node], y_N[node]) for node in (source_E[edge], target_E[edge])]
        colour, share = BLUE if weight_E[edge] > 0 else ORANGE, float(share_E[edge])
        style = dict(arrowstyle="-", connectionstyle="arc3,rad=0.06", color=colour, zorder=1)
        axes.add_patch(FancyArrowPatch(*ends, linewidth=0.4 + 3 * share, alpha=min(0.2 + share, 0.9), **style))

    first = graph.slice_of(LOGIT).start
    for kind, mark in _MARKS.items():
        here = drawn[table.kind_N[drawn] == kind]
        face = PAPER if kind in (ERROR, LOGIT) else GREY if kind == TOKEN else INK
        axes.scatter(x_N[here], y_N[here], 26, marker=mark, facecolor=face, edgecolor=INK, linewidth=0.8, zorder=2)
        for node in here.tolist():
            name = ""
            if kind == LOGIT:
                label, is_token = graph.labels[node - first], table.index_N[node] >= 0
                # A difference of logits and a direction have no probability.
                name = visible_token(label, in_line=not is_token) + (f" {table.value_N[node]:.2f}" if is_token else "")
            elif kind == FEATURE:
                feature = int(table.layer_N[node]), int(table.index_N[node])
                name = visible(labels.get(feature, "")) or str(feature[1])
            name = drawable(name)
            if len(name) > _NAME:
                name = f"{name[: _NAME - 1]}…"
            offset = (0, 5 + 9 * ((node - first) % 3 if kind == LOGIT else 0))
            axes.annotate(
                name, (x_N[node], y_N[node]), offset, textcoords="offset points", ha="center", size=6.5,
                zorder=3, path_effects=[withStroke(linewidth=2, foreground=PAPER)],
            )  # fmt: skip
    names = {-1: "tokens", graph.n_layers: "logits"}
    axes.set_yticks(range(rows), [names.get(layer, str(layer)) for layer in np.unique(table.layer_N[drawn]).tolist()])
    tokens = [drawable(visible_token(token)) for token in graph.tokens]
    axes.set_xticks(range(positions), tokens, rotation=40, ha="right")
    axes.set(xlim=(-0.6, positions - 0.4), ylim=(-0.5, rows), ylabel="layer")
    axes.tick_params(length=0)
    return figure

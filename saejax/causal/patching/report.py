"""The report on activation patching: where in the model a prompt's content stands, and which features carry it."""

import numpy as np
from matplotlib.figure import Figure

from saejax.causal.patching.grid import PatchingGrid
from saejax.causal.patching.paths import LOGITS
from saejax.causal.patching.report_features import tables
from saejax.causal.patching.results import FeaturePatchResults, HeadPatchResults, PatchedSites, SitePatchResults
from saejax.causal.patching.sites import DIRECTIONS
from saejax.dictionaries.labels import labels_in
from saejax.page import style
from saejax.page.blocks import Block, Picture, Terms
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, interval, number
from saejax.page.words import behaviour

_TITLES = dict(
    denoising="denoising: from prompt to counterpart",
    noising="noising: from counterpart to prompt",
)
_ESTIMATES = dict(atp_star="AtP*", atp="AtP", change="length of the change")
_SHOWN = 5  # nodes of each behaviour


def sections(found: Findings, draw: Draw) -> list[Section]:
    """Heatmaps of sites, and what features carry over; no section if nothing was patched."""
    blocks: list[Block] = []
    for unit, summary in found.summaries.items():
        results = summary.results
        if not isinstance(results, SitePatchResults | HeadPatchResults | FeaturePatchResults):
            continue
        if isinstance(results, SitePatchResults):
            grids = {
                name: PatchingGrid.load(PatchingGrid.file(found.folders[unit], name)) for name in results.behaviours
            }
            blocks += [
                _picture(results.kind, name, results.behaviours[name], grid, draw) for name, grid in grids.items()
            ]
        elif isinstance(results, HeadPatchResults):
            blocks += [_estimates_table(results), _nodes_table(results)]
            if any(one.paths for one in results.behaviours.values()):
                blocks.append(_paths_table(results))
        else:
            blocks += tables(results, labels_in(found.folders, results.dictionary))
        without = [(behaviour(name), f"not patched: {reason}.") for name, reason in results.unpatched.items()]
        if without:
            blocks.append(Terms(tuple(without)))
    return [Section("Where the content stands", tuple(blocks))] if blocks else []


def _picture(kind: str, name: str, result: PatchedSites, grid: PatchingGrid, draw: Draw) -> Picture:
    scale = "of the whole difference" if result.reason is None else "in logits"
    caption = (
        f"{behaviour(name)}: the value of {kind} at one layer and position is replaced, on {result.prompts} pairs "
        f"of prompts; how much of the answer moves, {scale}. Positions are counted from the end, named by their most "
        "frequent token; where prompt and counterpart differ the name is bold."
    )
    if result.reason:
        caption += f" Not normalised: {result.reason}."
    strongest = " ".join(
        f"{direction.capitalize()}: strongest at layer {best.layer}, position {number(best.position, 0)}, "
        f"{interval(best.effect)} logits."
        for direction, best in result.strongest.items()
    )
    if strongest:
        caption += f" The strongest places were chosen on train prompts and measured on test prompts. {strongest}"
    alt = f"Patching {kind}, {behaviour(name)}. {strongest}"
    return draw(f"patching-{kind}-{name}", heatmap(grid, result), caption, alt)


@style.styled
def heatmap(measured: PatchingGrid, result: PatchedSites) -> Figure:
    """The effect of every layer and position, a panel for each direction."""
    normalised = result.reason is None
    grid_DxLxC = measured.grid("normalised" if normalised else "effect")
    columns, layers = result.columns, grid_DxLxC.shape[1]
    limit = 1.0 if normalised else float(np.nanmax(np.abs(grid_DxLxC), initial=1e-6))
    height = 0.9 + 0.055 * layers + 0.4
    figure, below = style.panels([height, height], [_TITLES[direction] for direction in DIRECTIONS])
    for axes, grid_LxC in zip(below, grid_DxLxC, strict=True):
        image = axes.imshow(
            grid_LxC, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto", interpolation="nearest"
        )
        axes.set_ylabel("layer")
        size = min(9.0, 190 / len(columns))  # points: labels of neighbours do not touch
        axes.set_xticks(range(len(columns)), [_label(column.token) for column in columns], rotation=90, size=size)
        for text, column in zip(axes.get_xticklabels(), columns, strict=True):
            text.set_fontweight("bold" if column.differs else "normal")
        axes.tick_params(axis="x", length=2)
    figure.colorbar(image, ax=below, shrink=0.5, aspect=30, label="share moved" if normalised else "logits")
    return figure


def _label(token: str) -> str:
    shown = token.replace("\n", "\u21b5").strip() or "\u2423"
    return shown if len(shown) <= 12 else shown[:11] + "\u2026"


def _estimates_table(results: HeadPatchResults) -> Table:
    """How well AtP and AtP* order nodes, beside the length of the change alone and random nodes."""
    rows = []
    for name, found in results.behaviours.items():
        for estimate, judged in found.estimates.items():
            figures = (interval(judged.correlation), number(judged.top), interval(found.random), _p(judged.p_value))
            rows.append((behaviour(name), f"{found.nodes:,}", _ESTIMATES[estimate], *figures))
    note = (
        "A node is the query, key, value or output of an attention head at one position; patched, it takes the vector "
        "of the counterpart's run, and its effect is by how much the logit difference falls. AtP is change x gradient; "
        "AtP* has the QK fix and GradDrop (Kramar et al., 2024); the length of the change asks no gradient, and is "
        "what an estimate has to beat. Estimates are made on train prompts, effects measured on test prompts. Rank "
        f"correlation (Spearman) of the estimate's size with that of the effect over {results.drawn} random nodes "
        f"whose vector changes, 95 % bootstrap intervals over nodes; mean size of the effects of the {results.top} "
        "nodes that the estimate puts first, and of the random ones, in logits; p (Mann-Whitney): how often a random "
        "set would have effects as large, not adjusted for the number of tests."
    )
    columns = ("Behaviour", "Nodes", "Estimate", "Rank correlation with effect", "First nodes", "Random nodes", "p")
    return Table(
        "Attention heads: estimates and exact effects", columns, tuple(rows), frozenset({2}), stack=False, note=note
    )


def _nodes_table(results: HeadPatchResults) -> Table:
    rows = []
    for name, found in results.behaviours.items():
        tokens = {column.position: column.token for column in found.columns}
        for node in found.strongest[:_SHOWN]:
            place = f"{node.node} {node.layer}.{node.head}"
            at = f"{number(node.position, 0)} ({_label(tokens[node.position])})"
            effects = interval(node.effect), number(node.atp), number(node.atp_star)
            rows.append((behaviour(name), place, at, *effects))
    note = (
        f"The first {_SHOWN} nodes by AtP* on train prompts, in its order: layer.head, position from the end with its "
        "most frequent token, the exact effect on test prompts in logits, and what was estimated; AtP* is a size."
    )
    columns = ("Behaviour", "Node", "Position", "Effect", "AtP", "AtP*")
    caption = "Attention heads: the nodes that AtP* puts first"
    return Table(caption, columns, tuple(rows), frozenset({1, 2}), stack=False, note=note)


def _paths_table(results: HeadPatchResults) -> Table:
    rows = []
    for name, found in results.behaviours.items():
        for receiver in found.paths:
            place = f"{receiver.node} {receiver.layer}.{receiver.head} at {number(receiver.position, 0)}"
            for sender in receiver.strongest[:_SHOWN]:
                rows.append(
                    (
                        behaviour(name),
                        "logits" if receiver.node == LOGITS else place,
                        f"MLP {sender.layer}" if sender.head is None else f"head {sender.layer}.{sender.head}",
                        interval(sender.effect),
                        _p(sender.p_max_t),
                        interval(receiver.total),
                        f"{receiver.sure} of {receiver.senders}",
                    )
                )
    note = (
        "Path patching: a sender's output is that of the counterpart's run and reaches the receiver along the stream "
        "alone, all other heads and MLPs up to it as in the clean run; then the model goes on freely (after Wang et "
        f"al., 2022). By how much the logit difference falls, on test prompts, the {_SHOWN} largest of each receiver; "
        "p: sign flips over pairs, adjusted by maxT for all senders of the receiver, of which so many have p at most "
        "0.05. "
        "Whole: the effect of patching the receiver itself; of the logits, of replacing the prompt."
    )
    columns = ("Behaviour", "Receiver", "Sender", "Effect", "p", "Whole", "p at most 0.05")
    return Table("Paths along the stream", columns, tuple(rows), frozenset({1, 2}), stack=False, note=note)


def _p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)

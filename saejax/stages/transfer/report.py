"""The report's section on what dictionaries share: pairs, matrices, chains, and evaluation at other sites."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from saejax.matching.transfer.compared import WEIGHTS
from saejax.matching.transfer.results import ComparedPair, ComparedRows, Rebuilt, TransferResults
from saejax.page import style
from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, number, percent
from saejax.results import Interval
from saejax.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 15  # rows of a table
_MEASURES = dict(decoder="decoder rows", encoder="encoder rows", activity="activity")


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on what dictionaries share for each unit of the stage."""
    return [_section(results, draw) for results in findings.select(TransferResults).values()]


def _section(results: TransferResults, draw: Draw) -> Section:
    intro = (
        f"{counted(len(results.dictionaries), 'dictionary')} in {counted(len(results.pairs), 'pair')}. "
        f"{results.rule}. Null: random directions with the mean and covariance of the second dictionary's rows or, "
        "for activity, its activations on text shifted by half. All values are signed. Features that fire on no "
        "held-out text, and for activity features with too few firings, are not compared."
    )
    short = _shorten([entry.name for entry in results.dictionaries])
    unknown = [short[entry.name] for entry in results.dictionaries if not entry.dead_known]
    if unknown and {*WEIGHTS} & {measure for pair in results.pairs for measure in pair.measures}:
        intro += f" Cosines of {', '.join(unknown)} are of all features: which of them never fire is not known."
    blocks: list[Block] = [Text(intro)]
    if len(results.pairs) <= _ROWS:
        blocks.append(_pairs_table(results.pairs, short))
    if len(results.dictionaries) > 2:
        blocks += _matrices(results, short, draw)
    blocks += _chains(results, short)
    blocks += _transfers(results, short)
    return Section("What dictionaries share", tuple(blocks))


def _shorten(names: Sequence[str]) -> dict[str, str]:
    """Return each name as tables show it; of a long one the last parts, as many as tell it from the others."""
    short = {}
    for name in names:
        ends = ["/".join(PurePath(name).parts[-count:]) for count in range(2, len(PurePath(name).parts))]
        unique = (end for end in ends if sum(f"/{other}".endswith(f"/{end}") for other in names) == 1)
        short[name] = name if len(name) <= 24 else next(unique, name)
    return short


def _with_null(both: ComparedRows, name: str, show: Callable[[float], str] = number) -> str:
    value: Interval = getattr(both.scores, name)
    if not min(both.compared):
        return MISSING  # none of no features is no figure
    return f"{show(value.mean)} [{show(value.low)}, {show(value.high)}]; {show(getattr(both.null, name).mean)}"


def _pairs_table(pairs: Sequence[ComparedPair], short: Mapping[str, str]) -> Table:
    columns = {
        "Dictionaries, by": lambda pair, measure, both: (
            f"{short[pair.first]} and {short[pair.second]}, by {_MEASURES[measure]}"
        ),
        "Nearest": lambda pair, measure, both: _with_null(both, "nearest"),
        "Nearest, reversed": lambda pair, measure, both: _with_null(both, "nearest_back"),
        "Pairs": lambda pair, measure, both: _with_null(both, "matched"),
        "Shared": lambda pair, measure, both: _with_null(both, "shared", lambda share: percent(share, 1)),
        "Ceiling": lambda pair, measure, both: percent(both.ceiling if both.compared[0] else None, 1),
        "Compared (left out)": lambda pair, measure, both: " and ".join(
            f"{count:,} ({left_out:,})" for count, left_out in zip(both.compared, both.left_out, strict=True)
        ),
    }
    rows = [(pair, measure, both) for pair in pairs for measure, both in pair.measures.items()]
    note = (
        "Each figure with its 95 % interval over features; after the semicolon, the null. Nearest: mean over features "
        "of the largest value with a feature of the other dictionary (MMCS). Pairs: mean value of the one-to-one pairs "
        "with the largest sum (PW-MCC). Ceiling: the share of features that the first dictionary shares with itself on "
        "the same tokens. A dash: not measured, as where a dictionary has no feature to compare."
    )
    return Table.of("Pairs of dictionaries", rows, columns, note=note)


def _matrices(results: TransferResults, short: Mapping[str, str], draw: Draw) -> list[Block]:
    names = [entry.name for entry in results.dictionaries]
    blocks: list[Block] = []
    for measure in dict.fromkeys(name for pair in results.pairs for name in pair.measures):
        values = [pair.measures[measure] for pair in results.pairs if measure in pair.measures]
        most = max(values, key=lambda rows: rows.scores.shared.mean)
        caption = (
            f"Share of one-to-one pairs by {_MEASURES[measure]} that are shared, and the same under the null. The "
            f"largest is {percent(most.scores.shared.mean, 1)}, under the null {percent(most.null.shared.mean, 1)}; "
            f"mean value of its pairs {number(most.scores.matched.mean)}, under the null "
            f"{number(most.null.matched.mean)}."
        )
        shares, null_shares = (_share_matrix(names, results.pairs, measure, side) for side in ("scores", "null"))
        figure = draw_heatmaps([*short.values()], {"shared": shares, "null": null_shares}, "share of pairs")
        blocks.append(draw(f"transfer-{measure}", figure, caption, caption))
    return blocks


def _share_matrix(names: Sequence[str], pairs: Sequence[ComparedPair], measure: str, side: str) -> np.ndarray:
    """Return the shares of pairs by a measure, "scores" or under the "null", [N, N]; NaN where not compared."""
    values, index_of = np.full((len(names), len(names)), np.nan), {name: index for index, name in enumerate(names)}
    for pair in pairs:
        if measure in pair.measures and min(pair.measures[measure].compared):
            first, second = index_of[pair.first], index_of[pair.second]
            values[first, second] = values[second, first] = getattr(pair.measures[measure], side).shared.mean
    return values


@style.styled
def draw_heatmaps(names: Sequence[str], matrices: dict[str, np.ndarray], label: str) -> "Figure":
    """Return matrices of dictionaries by dictionaries, one below the other, on one scale from 0 to 1."""
    figure, below = style.panels([3.55] * len(matrices), list(matrices))
    step = -(-len(names) // 12)
    ticks, ends = range(0, len(names), step), [name.rpartition("/")[2] or name for name in names]
    # Members of two kinds may have the same names.
    shown = [name if len(name) <= 16 else "…" + name[-15:] for name in (ends if len({*ends}) == len(ends) else names)]
    for axes, values in zip(below, matrices.values(), strict=True):
        image = axes.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.set_xticks(ticks, [shown[i] for i in ticks], rotation=90, size=7.5)
        axes.set_yticks(ticks, [shown[i] for i in ticks], size=7.5)
    figure.colorbar(image, ax=below, shrink=0.6, aspect=30, label=label)
    return figure


def _chains(results: TransferResults, short: Mapping[str, str]) -> list[Block]:
    blocks: list[Block] = []
    for chains in results.chains:
        lengths = sorted({*chains.lengths, *chains.lengths_null})
        ends = f"{short[chains.dictionaries[0]]} to {short[chains.dictionaries[-1]]}"
        title = f"Chains of features shared by {_MEASURES[chains.measure]}, {ends}"
        counts = (chains.lengths, chains.lengths_null)
        rows = tuple((str(length), *(f"{of_side.get(length, 0):,}" for of_side in counts)) for length in lengths)
        longest = "; ".join(
            f"{chain.label or 'a feature without a label'} (features {', '.join(map(str, chain.features))}, from "
            f"{short[chain.first]} on, weakest link {number(chain.value)})"
            for chain in chains.longest[:5]
        )
        table = Table(title, ("Layers", "Chains", "Null"), rows, note=f"The longest: {longest or 'none'}.")
        blocks.append(table if rows else Text(f"{title}: there are none."))
    return blocks


def _transfers(results: TransferResults, short: Mapping[str, str]) -> list[Block]:
    """Return a table of the dictionaries that explain most at each other's sites; nothing if none was evaluated."""
    moved = [
        (f"{short[first]} at the site of {short[second]}", transfer)
        for pair in results.pairs
        for first, second, transfer in (
            (pair.first, pair.second, pair.onto_second),
            (pair.second, pair.first, pair.onto_first),
        )
        if transfer
    ]
    moved.sort(key=lambda row: -row[1].affine.explained_variance)
    left_out = f" {len(moved) - _ROWS:,} others explain less." if len(moved) > _ROWS else ""
    note = (
        "Explained variance on held-out text (and L0). Rotated: the "
        "dictionary after a random rotation, which is the null. With maps: an affine map to the dictionary's own site "
        "and one back, fitted on other text. R²: share of variance that these maps explain on held-out text; maps that "
        f"were fitted on fewer than 4 tokens per dimension explain less than they could.{left_out}"
    )
    columns = {
        "Dictionary": lambda name, transfer: name,
        "Own dictionary": lambda name, transfer: _rebuilt(transfer.native),
        "Unchanged": lambda name, transfer: _rebuilt(transfer.direct),
        "Rotated": lambda name, transfer: _rebuilt(transfer.direct_null),
        "With maps": lambda name, transfer: _rebuilt(transfer.affine),
        "Rotated, with maps": lambda name, transfer: _rebuilt(transfer.affine_null),
        "R² in, back": lambda name, transfer: f"{number(transfer.into.r2)}, {number(transfer.back.r2)}",
    }
    return [Table.of("Dictionaries at other sites", moved[:_ROWS], columns, note=note)] if moved else []


def _rebuilt(scores: Rebuilt | None) -> str:
    return MISSING if scores is None else f"{number(scores.explained_variance)} ({number(scores.l0, 0)})"

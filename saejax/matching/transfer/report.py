"""The report's section on what dictionaries share: pairs, matrices, shares, chains, and evaluation at other sites."""

from collections.abc import Callable, Sequence
from pathlib import PurePath

import numpy as np
from matplotlib.figure import Figure

from saejax.matching.transfer.results import ComparedPair, FittedMap, Rebuilt, ReconstructionTransfer, TransferResults
from saejax.page import style
from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent
from saejax.results import Interval

_ROWS = 15  # pairs or dictionaries in a table; more are drawn
_MEASURES = dict(decoder="decoder rows", encoder="encoder rows", activity="activity")


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on what dictionaries share for each unit of the stage."""
    return [_section(results, draw) for results in findings.each(TransferResults).values()]


def _section(results: TransferResults, draw: Draw) -> Section:
    intro = (
        f"{len(results.dictionaries)} dictionaries in {len(results.pairs)} pairs. {results.rule}. Null: random "
        "directions with the mean and covariance of the second dictionary's rows or, for activity, its activations on "
        "text shifted by half. All values are signed. Dead features, and for activity features with too few firings, "
        "are not compared."
    )
    few = len(results.pairs) <= _ROWS
    blocks: list[Block] = [Text(intro)]
    if few:
        blocks.append(_pairs_table(results.pairs))
    if len(results.dictionaries) > 2:
        blocks += _matrices(results, draw)
    if len(results.dictionaries) <= _ROWS:
        blocks.append(_shares_table(results))
    blocks += _chains(results)
    blocks += _transfers(results, draw, few)
    return Section("What dictionaries share", tuple(blocks))


def _short(name: str) -> str:
    """Return a dictionary's name; of a folder the last parts."""
    return name if len(name) <= 24 else "/".join(PurePath(name).parts[-2:])


def _title(pair: ComparedPair) -> str:
    return f"{_short(pair.first)} and {_short(pair.second)}"


def _with_null(value: Interval, null: Interval, show: Callable[[float], str]) -> str:
    return f"{show(value.mean)} [{show(value.low)}, {show(value.high)}]; {show(null.mean)}"


def _pairs_table(pairs: Sequence[ComparedPair]) -> Table:
    columns = (
        "Dictionaries, by",
        "Nearest",
        "Nearest, reversed",
        "Pairs",
        "Shared",
        "Ceiling",
        "Above 0.9",
        "Compared (left out)",
    )
    rows = []
    for pair in pairs:
        for measure, rows_by in pair.measures.items():
            means = [
                _with_null(getattr(rows_by.scores, name), getattr(rows_by.null, name), number)
                for name in ("nearest", "nearest_back", "matched")
            ]
            shared, close = (
                _with_null(getattr(rows_by.scores, name), getattr(rows_by.null, name), lambda share: percent(share, 1))
                for name in ("shared", "close")
            )
            ceiling = MISSING if rows_by.ceiling is None else percent(rows_by.ceiling, 1)
            counts = " and ".join(
                f"{count:,} ({left_out:,})" for count, left_out in zip(rows_by.compared, rows_by.left_out, strict=True)
            )
            rows.append((f"{_title(pair)}, by {_MEASURES[measure]}", *means, shared, ceiling, close, counts))
    note = (
        "Each figure with its 95 % interval over features; after the semicolon, the null. Nearest: mean over features "
        "of the largest value with a feature of the other dictionary (MMCS). Pairs: mean value of the one-to-one pairs "
        "with the largest sum (PW-MCC). Ceiling: the share of features that the first dictionary shares with itself on "
        "the same tokens."
    )
    return Table("Pairs of dictionaries", columns, tuple(rows), note=note)


def _matrices(results: TransferResults, draw: Draw) -> list[Block]:
    names = [each.name for each in results.dictionaries]
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
        figure = draw_heatmaps(names, {"shared": shares, "null": null_shares}, "share of pairs")
        blocks.append(draw(f"transfer-{measure}", figure, caption, caption))
    return blocks


def _share_matrix(names: Sequence[str], pairs: Sequence[ComparedPair], measure: str, side: str) -> np.ndarray:
    """Return the shares of pairs by a measure, "scores" or under the "null", [N, N]."""

    def share(pair: ComparedPair) -> tuple[float, float]:
        value = getattr(pair.measures[measure], side).shared.mean if measure in pair.measures else np.nan
        return value, value

    return _matrix(names, pairs, share)


def _matrix(
    names: Sequence[str], pairs: Sequence[ComparedPair], value: Callable[[ComparedPair], tuple[float, float]]
) -> np.ndarray:
    """Return values of the row's and the column's dictionary, [N, N]; NaN where they were not compared."""
    values = np.full((len(names), len(names)), np.nan)
    index_of = {name: index for index, name in enumerate(names)}
    for pair in pairs:
        first, second = index_of[pair.first], index_of[pair.second]
        values[first, second], values[second, first] = value(pair)
    return values


@style.styled
def draw_heatmaps(names: Sequence[str], matrices: dict[str, np.ndarray], label: str) -> Figure:
    """Return matrices of dictionaries by dictionaries, one below the other, on one scale from 0 to 1."""
    figure, below = style.panels([3.55] * len(matrices), list(matrices))
    step = -(-len(names) // 12)
    ticks = range(0, len(names), step)
    for axes, values in zip(below, matrices.values(), strict=True):
        image = axes.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.set_xticks(ticks, [_tick(names[i]) for i in ticks], rotation=90, size=7.5)
        axes.set_yticks(ticks, [_tick(names[i]) for i in ticks], size=7.5)
    figure.colorbar(image, ax=below, shrink=0.6, aspect=30, label=label)
    return figure


def _tick(name: str) -> str:
    text = _short(name).rpartition("/")[2] or name
    return text if len(text) <= 16 else "…" + text[-15:]


def _shares_table(results: TransferResults) -> Table:
    features = {each.name: each.features for each in results.dictionaries}
    columns = {
        "Dictionary": lambda share: _short(share.name),
        "Features": lambda share: f"{features[share.name]:,}",
        "By": lambda share: _MEASURES[share.measure],
        "Shared with every other": lambda share: f"{_percents(share.everywhere)}; {percent(share.everywhere_null, 1)}",
        "Shared with at least one": lambda share: f"{_percents(share.somewhere)}; {percent(share.somewhere_null, 1)}",
        "Shared with none": lambda share: _percents(share.nowhere),
    }
    rows = [(share,) for share in results.shares]
    return Table.of("Shared features", rows, columns, words={"By"}, note="After the semicolon, the null.")


def _percents(value: Interval) -> str:
    return interval(value, 1, 100.0) + "\u00a0%"


def _chains(results: TransferResults) -> list[Block]:
    blocks: list[Block] = []
    for chains in results.chains:
        lengths = sorted({*chains.lengths, *chains.lengths_null})
        ends = f"{_short(chains.dictionaries[0])} to {_short(chains.dictionaries[-1])}"
        title = f"Chains of features shared by {_MEASURES[chains.measure]}, {ends}"
        if not lengths:
            blocks.append(Text(f"{title}: there are none."))
            continue
        rows = tuple(
            (str(length), f"{chains.lengths.get(length, 0):,}", f"{chains.lengths_null.get(length, 0):,}")
            for length in lengths
        )
        longest = "; ".join(
            f"{chain.label or 'a feature without a label'} (features {', '.join(map(str, chain.features))}, from "
            f"{_short(chain.first)} on, weakest link {number(chain.value)})"
            for chain in chains.longest[:5]
        )
        blocks.append(Table(title, ("Layers", "Chains", "Null"), rows, note=f"The longest: {longest}."))
    return blocks


def _transfers(results: TransferResults, draw: Draw, few: bool) -> list[Block]:
    """Return the scores of dictionaries at each other's sites."""
    moved = [
        (f"{_short(first)} at the site of {_short(second)}", transfer)
        for pair in results.pairs
        for first, second, transfer in (
            (pair.first, pair.second, pair.onto_second),
            (pair.second, pair.first, pair.onto_first),
        )
        if transfer
    ]
    if not moved:
        return []
    note = (
        "Explained variance on held-out text (and L0). Rotated: the "
        "dictionary after a random rotation, which is the null. With maps: an affine map to the dictionary's own site "
        "and one back, fitted on other text. R²: share of variance that these maps explain on held-out text; maps that "
        "were fitted on fewer than 4 tokens per dimension explain less than they could."
    )
    if few:
        columns = (
            "Dictionary",
            "Own dictionary",
            "Unchanged",
            "Rotated",
            "With maps",
            "Rotated, with maps",
            "R² in, back",
        )
        rows = tuple((name, *_transfer_cells(transfer)) for name, transfer in moved)
        return [Table("Dictionaries at other sites", columns, rows, note=note)]
    names = [each.name for each in results.dictionaries]

    def value(part: str) -> Callable[[ComparedPair], tuple[float, float]]:
        def of(pair: ComparedPair) -> tuple[float, float]:
            parts = [getattr(each, part) if each else None for each in (pair.onto_second, pair.onto_first)]
            first, second = (np.nan if each is None else max(each.explained_variance, 0.0) for each in parts)
            return first, second

        return of

    titles = dict(direct="unchanged", direct_null="rotated", affine="with maps", affine_null="rotated, with maps")
    matrices = {title: _matrix(names, results.pairs, value(part)) for part, title in titles.items()}
    caption = f"The row's dictionary at the site of the column's. {note} Values below 0 are shown as 0."
    return [draw("transfer-sites", draw_heatmaps(names, matrices, "explained variance"), caption, caption)]


def _transfer_cells(transfer: ReconstructionTransfer) -> tuple[str, ...]:
    def cell(scores: Rebuilt | None) -> str:
        if scores is None:
            return MISSING
        return f"{number(scores.explained_variance)} ({number(scores.l0, 0)})"

    def r2(fitted: FittedMap) -> str:
        return number(fitted.r2)

    parts = (transfer.native, transfer.direct, transfer.direct_null, transfer.affine, transfer.affine_null)
    return (*map(cell, parts), f"{r2(transfer.into)}, {r2(transfer.back)}")

"""The report on one dictionary in the place of another."""

from collections.abc import Callable, Sequence

import numpy as np

from saejax.page.blocks import Block
from saejax.page.findings import Draw
from saejax.page.tables import MISSING, Table, number, percent
from saejax.transfer.report_matrices import ROWS, heatmaps, matrix, short
from saejax.transfer.results import ComparedPair, ReconstructionTransfer, TransferResults


def places(results: TransferResults, draw: Draw, few: bool) -> list[Block]:
    """One dictionary in the place of another."""
    moved = [
        (f"{short(first)} in the place of {short(second)}", onto)
        for pair in results.pairs
        for first, second, onto in (
            (pair.first, pair.second, pair.onto_second),
            (pair.second, pair.first, pair.onto_first),
        )
        if onto
    ]
    if not moved:
        return []
    note = (
        "Explained variance of the held-out half of the text (and active features per token; cross-entropy recovered "
        "against the mean, where it was measured). Turned: the same dictionary after a random rotation, which is "
        "chance. Between maps: an affine map to the dictionary's own site and one back, fitted on the other half."
    )
    if few:
        columns = ("Dictionary", "The one that is there", "As it is", "Turned", "Between maps", "Turned, between maps")
        rows = tuple((name, *_rebuilt(one)) for name, one in moved)
        return [Table("In the place of another", columns, rows, note=note), *_tuning_table(moved)]
    names = [one.name for one in results.dictionaries]

    def value(part: str) -> Callable[[ComparedPair], tuple[float, float]]:
        def of(pair: ComparedPair) -> tuple[float, float]:
            both = [getattr(one, part) if one else None for one in (pair.onto_second, pair.onto_first)]
            first, second = (np.nan if one is None else max(one.explained_variance, 0.0) for one in both)
            return first, second

        return of

    titles = dict(direct="as it is", direct_null="turned", affine="between maps", affine_null="turned, between maps")
    matrices = {title: matrix(names, results.pairs, value(part)) for part, title in titles.items()}
    caption = f"The row's dictionary in the place of the column's. {note} Below 0 is shown as 0."
    blocks: list[Block] = [
        draw("transfer-places", heatmaps(names, matrices, 1.0, "explained variance"), caption, caption)
    ]
    return blocks + _tuning_table(sorted(moved, key=_saved, reverse=True)[:ROWS])


def _saved(named: tuple[str, ReconstructionTransfer]) -> float:
    return named[1].fine_tuning.saved if named[1].fine_tuning else -1.0


def _tuning_table(moved: Sequence[tuple[str, ReconstructionTransfer]]) -> list[Block]:
    """What going on from another place's dictionary saves in training; where there are many, the largest savings."""
    columns = ("Dictionary", "Tokens", "Random start", "Goes on", "Turned, goes on", "Saves", "Turned, saves")
    rows = tuple(
        (
            name,
            f"{one.tokens[-1]:,}",
            *(number(curve[-1]) for curve in (one.scratch, one.tuned, one.turned)),
            percent(one.saved),
            percent(one.saved_null),
        )
        for name, place in moved
        if (one := place.fine_tuning)
    )
    note = (
        "Explained variance after training there on these tokens: from a random start, on from where the other place's "
        "dictionary ended, and on from that after a random rotation. Saves: the share of the random start's tokens "
        "that are not needed to explain as much as it does in the end; 0: it never does."
    )
    return [Table("What training goes on from", columns, rows, note=note)] if rows else []


def _rebuilt(one: ReconstructionTransfer) -> tuple[str, ...]:
    cells = []
    for part in (one.own, one.direct, one.direct_null, one.affine, one.affine_null):
        if part is None:
            cells.append(MISSING)
            continue
        ce = "" if part.ce_recovered is None else f"; {number(part.ce_recovered)}"
        cells.append(f"{number(part.explained_variance)} ({number(part.l0, 0)}{ce})")
    return tuple(cells)

"""The report on what dictionaries share: matrices of pairs, shares, chains through layers, one in another's place."""

from collections.abc import Callable, Sequence

import numpy as np

from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent
from saejax.page.words import behaviour
from saejax.results import Interval
from saejax.transfer.report_matrices import ROWS, heatmaps, matrix, short
from saejax.transfer.report_places import places
from saejax.transfer.results import ComparedPair, TransferResults

_MEASURES = dict(
    decoder="decoder rows", encoder="encoder rows", folded="decoder rows times thresholds", activity="activity"
)


def sections(found: Findings, draw: Draw) -> list[Section]:
    """What dictionaries share; no section if none were compared."""
    return [_section(results, draw) for results in found.each(TransferResults).values()]


def _section(results: TransferResults, draw: Draw) -> Section:
    few = len(results.pairs) <= ROWS
    intro = (
        f"{len(results.dictionaries)} dictionaries, every two of them compared. {results.rule}. By chance: what is "
        "found in the place of the second dictionary in as many random directions with the mean and covariance of its "
        "rows, or, of activity, on text shifted by half. All values are signed."
    )
    blocks: list[Block] = [Text(intro)]
    if few:
        blocks.append(_pairs_table(results.pairs))
    if len(results.dictionaries) > 2:
        blocks += _matrices(results, draw)
    if len(results.dictionaries) <= ROWS:
        blocks.append(_shares_table(results))
    blocks += _chains(results)
    blocks += places(results, draw, few)
    if causal := [pair for pair in results.pairs if pair.causal]:
        blocks.append(_causal_table(causal))
    return Section("What dictionaries share", tuple(blocks))


def _title(pair: ComparedPair) -> str:
    return f"{short(pair.first)} and {short(pair.second)}"


def _beside(value: Interval, null: Interval, shown: Callable[[float], str]) -> str:
    return f"{shown(value.mean)} [{shown(value.low)}, {shown(value.high)}]; {shown(null.mean)}"


def _pairs_table(pairs: Sequence[ComparedPair]) -> Table:
    columns = ("Dictionaries, by", "Nearest", "Nearest, back", "Pairs", "Shared", "Above 0.9", "SVCCA", "RSA")
    rows = []
    for pair in pairs:
        for measure, both in pair.measures.items():
            own = [
                (getattr(both.found, name), getattr(both.null, name)) for name in ("nearest", "nearest_back", "matched")
            ]
            shares = [(getattr(both.found, name), getattr(both.null, name)) for name in ("shared", "close")]
            cells = [_beside(*two, number) for two in own]
            cells += [_beside(*two, lambda share: percent(share, 1)) for two in shares]
            rows.append((f"{_title(pair)}, by {_MEASURES[measure]}", *cells, *_spaces(pair)))
    note = (
        "Each figure with its 95 % interval over features; after the semicolon, by chance. Nearest: mean over "
        "features of the largest cosine with one of the other dictionary (MMCS). Pairs: mean cosine of the one-to-one "
        "pairs with the largest sum (PW-MCC). SVCCA and RSA: whether the decoder rows of shared features lie to one "
        "another in both dictionaries alike; after the semicolon with the pairs shuffled."
    )
    alike = [pair.measures["activity"].alike for pair in pairs if "activity" in pair.measures]
    if alike:
        told = ", ".join(number(one) for one in alike)
        note += f" With partners replaced by features that fire as often, the mean correlation of pairs is {told}."
    agreeing = [percent(pair.agreeing) for pair in pairs if pair.agreeing is not None]
    if agreeing:
        note += f" Decoder and encoder give the same partner to {', '.join(agreeing)} of the features."
    return Table("Every two dictionaries", columns, tuple(rows), note=note)


def _spaces(pair: ComparedPair) -> tuple[str, str]:
    found = pair.spaces
    if found is None:
        return MISSING, MISSING
    return (
        f"{number(found.svcca)}; {interval(found.svcca_null)}",
        f"{number(found.rsa)}; {interval(found.rsa_null)}",
    )


def _matrices(results: TransferResults, draw: Draw) -> list[Block]:
    names = [one.name for one in results.dictionaries]
    blocks: list[Block] = []
    for measure in dict.fromkeys(name for pair in results.pairs for name in pair.measures):
        found, null = (_share_matrix(names, results.pairs, measure, side) for side in ("found", "null"))
        worth = [pair.measures[measure] for pair in results.pairs if measure in pair.measures]
        most = max(worth, key=lambda both: both.found.shared.mean)
        caption = (
            f"Share of one-to-one pairs by {_MEASURES[measure]} that are shared, and the same by chance. The largest "
            f"is {percent(most.found.shared.mean, 1)}, where chance gives {percent(most.null.shared.mean, 1)}; mean "
            f"value of its pairs {number(most.found.matched.mean)}, by chance {number(most.null.matched.mean)}."
        )
        figure = heatmaps(names, {"shared": found, "by chance": null}, 1.0, "share of pairs")
        blocks.append(draw(f"transfer-{measure}", figure, caption, caption))
    return blocks


def _share_matrix(names: Sequence[str], pairs: Sequence[ComparedPair], measure: str, side: str) -> np.ndarray:
    """Shares of pairs, "found" or "null", which are the same both ways."""

    def share(pair: ComparedPair) -> tuple[float, float]:
        value = getattr(pair.measures[measure], side).shared.mean if measure in pair.measures else np.nan
        return value, value

    return matrix(names, pairs, share)


def _shares_table(results: TransferResults) -> Table:
    columns = {
        "Dictionary": lambda one, about: short(one.name),
        "Features": lambda one, about: f"{about.features:,}",
        "Shared with every other": lambda one, about: f"{_percents(one.everywhere)}; {percent(one.everywhere_null, 1)}",
        "With one at least": lambda one, about: f"{_percents(one.somewhere)}; {percent(one.somewhere_null, 1)}",
        "With none": lambda one, about: _percents(one.nowhere),
    }
    rows, note = zip(results.shares, results.dictionaries, strict=True), "After the semicolon, by chance."
    return Table.of("Features that dictionaries have in common", rows, columns, note=note)


def _percents(value: Interval) -> str:
    return interval(value, 1, 100.0) + "\u00a0%"


def _chains(results: TransferResults) -> list[Block]:
    blocks: list[Block] = []
    for one in results.chains:
        lengths = sorted({*one.lengths, *one.lengths_null})
        rows = tuple(
            (str(length), f"{one.lengths.get(length, 0):,}", f"{one.lengths_null.get(length, 0):,}")
            for length in lengths
        )
        title = f"Chains of shared features, {short(one.dictionaries[0])} to {short(one.dictionaries[-1])}"
        if not rows:
            blocks.append(Text(f"{title}: there are none."))
            continue
        longest = "; ".join(
            f"{short(chain.first)}, features {', '.join(map(str, chain.features))}"
            + (f" (“{chain.label}”)" if chain.label else "")
            + f", weakest link {number(chain.value)}"
            for chain in one.longest[:5]
        )
        blocks.append(Table(title, ("Layers", "Chains", "By chance"), rows, note=f"The longest: {longest}."))
    return blocks


def _causal_table(pairs: Sequence[ComparedPair]) -> Table:
    columns = ("Dictionaries", "Behaviour", "Shared features", "Rank correlation", "Shuffled", "Alike")
    rows = []
    for pair in pairs:
        for name, one in (pair.causal or {}).items():
            values = (one.rank_correlation, one.shuffled, one.alike)
            rows.append((_title(pair), behaviour(name), f"{one.matched:,}", *map(interval, values)))
    note = (
        "Of what removing each feature costs in the one dictionary and in the other, over the shared features that "
        "fire in both. Shuffled: with the pairs shuffled. Alike: each partner replaced by one that fires as often and "
        "as strongly."
    )
    words = frozenset({1})
    return Table("Whether shared features have the same effect", columns, tuple(rows), words=words, note=note)

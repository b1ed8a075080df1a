"""The report on groups of features: how stable they are, what they are called, whether views agree."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from saejax.clusters.results import ClusteredDictionary, ClusterResults, FeatureGroup, Grouping, GroupingAgreement
from saejax.page import style
from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, significant
from saejax.page.words import behaviour

_GROUPS = 8  # groups of a grouping that are shown
_DICTIONARIES = 3  # whose groups are shown
_VIEWS = dict(coactivation="fire together", effects="cost the same", decoder="write alike")


def sections(found: Findings, draw: Draw) -> list[Section]:
    """Groups of features; no section if none were asked for."""
    return [_section(results, draw) for results in found.each(ClusterResults).values()]


def _section(results: ClusterResults, draw: Draw) -> Section:
    intro = (
        "Features that fire together on text, that write alike directions, and, where it was measured, whose removal "
        f"costs the same prompts. {results.rule}. Shuffled: each feature's firings moved along the text, its effects "
        "dealt out to other prompts, or random directions with the decoder's mean and covariance. The same features "
        "of noise have groups, too: what does not exceed them is chance."
    )
    told = [one for one in results.dictionaries if one.groupings]
    blocks: list[Block] = [Text(intro)]
    if told:
        blocks += [_picture(told, draw), *(_groups_table(one) for one in told[:_DICTIONARIES])]
    between = [(one.name, pair) for one in told for pair in one.between_views]
    between += [("", pair) for pair in results.between_dictionaries]
    if between:
        blocks.append(_between_table(between))
    for one in results.dictionaries:
        if one.without:
            reasons = "; ".join(f"{view}: {why}" for view, why in one.without.items())
            blocks.append(Text(f"Left out of {one.name}: {reasons}."))
    return Section("Features that belong together", tuple(blocks))


def _picture(dictionaries: Sequence[ClusteredDictionary], draw: Draw) -> Block:
    caption = (
        "How well groups are found again: the adjusted Rand index of all features with groups found on bootstrap "
        "samples (of documents, prompts, coordinates), mean and range, beside shuffled data with samples of them. "
        "1: the same groups; 0: no more agreement than of groups dealt out at random."
    )
    told = "; ".join(
        f"{one.name}, features that {_VIEWS[own.view]}, {own.method}: {number(own.agreement.mean)}, shuffled "
        f"{number(own.agreement_null.mean)}, {own.stable_groups} of {own.count} groups stable (shuffled data have "
        f"{number(own.count_null, 0)} groups)"
        for one in dictionaries
        for own in one.groupings
    )
    return draw("clusters", stabilities(dictionaries), caption, f"{caption} {told}.")


@style.styled
def stabilities(dictionaries: Sequence[ClusteredDictionary]) -> Figure:
    """The agreement of each grouping with samples, beside that of shuffled data; a panel for each dictionary."""
    names = [[f"{_VIEWS[own.view]}, {own.method}" for own in one.groupings] for one in dictionaries]
    heights = [style.height_of(some, 0.45) + 0.7 for some in names]  # with the title and the axis
    figure, below = style.panels(heights, [one.name for one in dictionaries])
    for axes, one, rows in zip(below, dictionaries, names, strict=True):
        for y, own in enumerate(one.groupings):
            style.point(axes, own.agreement, y - 0.1, style.BLUE, "o", "found")
            style.point(axes, own.agreement_null, y + 0.1, style.GREY, "s", "shuffled")
        axes.set_xlim(-0.05, 1.03)
        style.name_rows(axes, rows)
    below[-1].set_xlabel("adjusted Rand index with bootstrap samples")
    style.legend(below[-1], 2)
    return figure


def _groups_table(one: ClusteredDictionary) -> Table:
    columns = ("Group", "Found by", "Features", "Alike", "Overlap", "Costs", "The most central")
    rows = [_row(own, group) for own in one.groupings for group in [g for g in own.largest if g.stable][:_GROUPS]] or [
        ("no group is stable", *[MISSING] * 6)
    ]
    note = (
        "Stable groups, largest first, named by the label of their most central feature that has one. Alike: mean "
        "correlation, or cosine, of two of its features. Overlap: with the nearest group of a bootstrap sample, mean. "
        "Costs: behaviours that the group's features, removed one by one, cost more in sum than 2,000 matched sets "
        "(q at most 0.05), on prompts that did not form the groups; a group is called after a behaviour only then."
    )
    title = f"Groups of {one.name}: {one.tokens:,} tokens"
    return Table(title, columns, tuple(rows), words=frozenset({1, 5, 6}), note=note)


def _row(own: Grouping, group: FeatureGroup) -> tuple[str, ...]:
    named = "; ".join(
        f"{behaviour(name)} ({number(group.costs[name].drop)}; matched {number(group.costs[name].matched_drop)}, "
        f"q = {significant(group.costs[name].q, 2)})"
        for name in group.primitives
    )
    title = f"{', '.join(map(behaviour, group.primitives))}: {group.name}" if group.primitives else group.name
    return (
        title,
        f"{_VIEWS[own.view]}, {own.method}",
        f"{len(group.features):,}",
        number(group.alike),
        number(group.overlap),
        named or MISSING,
        ", ".join(map(str, group.features[:6])),
    )


def _between_table(pairs: Sequence[tuple[str, GroupingAgreement]]) -> Table:
    rows = tuple(
        (
            f"{name}: {one.first} and {one.second}" if name else f"{one.first} and {one.second}, {one.view}",
            one.method,
            f"{one.features:,}",
            number(one.agreement),
            interval(one.null),
        )
        for name, one in pairs
    )
    note = (
        "Whether features that are alike in one view are so in another, and whether dictionaries of one site group the "
        "features alike whose decoder rows match. Shuffled: with the groups dealt out to other features, middle 95 %."
    )
    columns = ("Groupings", "Method", "Features", "Adjusted Rand index", "Shuffled")
    return Table("Whether groupings agree", columns, rows, words=frozenset({1}), note=note)

"""The report's section on groups of features: how stable they are, and their names."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from saejax.matching.clusters.results import ClusteredDictionary, ClusterResults, FeatureGroup, Grouping
from saejax.page import style
from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, number

_GROUPS = 8  # groups of a view that are shown
_DICTIONARIES = 3  # dictionaries whose groups are shown
_VIEWS = dict(coactivation="firing together", decoder="similar decoder rows")


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on groups of features for each unit of the stage."""
    return [_section(results, draw) for results in findings.each(ClusterResults).values()]


def _section(results: ClusterResults, draw: Draw) -> Section:
    intro = (
        "Features are grouped (HDBSCAN) by firing together on text, and by similar decoder rows. "
        f"{results.rule}. Shuffled data: firings moved along the text, or random directions with the decoder's mean "
        "and covariance."
    )
    shown = [each for each in results.dictionaries if each.groupings]
    blocks: list[Block] = [Text(intro)]
    if shown:
        blocks += [_picture(shown, draw), *(_groups_table(each) for each in shown[:_DICTIONARIES])]
    for each in results.dictionaries:
        if each.without:
            reasons = "; ".join(f"{view}: {reason}" for view, reason in each.without.items())
            blocks.append(Text(f"Skipped for {each.name}: {reasons}."))
    return Section("Feature clusters", tuple(blocks))


def _picture(dictionaries: Sequence[ClusteredDictionary], draw: Draw) -> Block:
    caption = "Number of stable groups in each view; in grey the mean number of groups of shuffled data, none stable."
    counts = "; ".join(
        f"{each.name}, {_VIEWS[grouping.view]}: {grouping.stable_groups} of {grouping.count} groups are stable "
        f"(overlap above {number(grouping.bar)}); shuffled data have {number(grouping.count_null, 1)} groups"
        for each in dictionaries
        for grouping in each.groupings
    )
    return draw("clusters", draw_counts(dictionaries), caption, f"{caption} {counts}.")


@style.styled
def draw_counts(dictionaries: Sequence[ClusteredDictionary]) -> Figure:
    """Return bars of the stable groups of each view and of the groups of shuffled data, a panel per dictionary."""
    names = [[_VIEWS[grouping.view] for grouping in each.groupings] for each in dictionaries]
    heights = [style.height_of(some, 0.45) + 0.7 for some in names]  # with the title and the axis
    figure, below = style.panels(heights, [each.name for each in dictionaries])
    for axes, each, rows in zip(below, dictionaries, names, strict=True):
        for y, grouping in enumerate(each.groupings):
            axes.barh(y - 0.16, grouping.stable_groups, 0.3, color=style.BLUE, label="stable groups")
            axes.barh(y + 0.16, grouping.count_null, 0.3, color=style.GREY, label="groups of shuffled data")
        style.name_rows(axes, rows)
    below[-1].set_xlabel("groups")
    style.legend(below[-1], 2)
    return figure


def _groups_table(dictionary: ClusteredDictionary) -> Table:
    columns = ("Group", "By", "Features", "Mean similarity", "Overlap", "Most central features")
    rows = [
        _row(grouping, group)
        for grouping in dictionary.groupings
        for group in [group for group in grouping.largest if group.stable][:_GROUPS]
    ]
    note = (
        "Stable groups, largest first, named by the label of their most central feature that has one. Mean similarity: "
        "correlation, or cosine, of two of its features. Overlap: with the most similar group of a bootstrap sample, "
        "mean."
    )
    title = f"Groups of {dictionary.name}, on {dictionary.tokens:,} tokens"
    rows = rows or [("no group is stable", *[MISSING] * 5)]
    return Table(title, columns, tuple(rows), words=frozenset({1, 5}), note=note)


def _row(grouping: Grouping, group: FeatureGroup) -> tuple[str, ...]:
    return (
        group.name,
        _VIEWS[grouping.view],
        f"{len(group.features):,}",
        number(group.mean_similarity),
        number(group.overlap),
        ", ".join(map(str, group.features[:6])),
    )

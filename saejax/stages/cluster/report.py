"""The report's section on groups of features: how stable they are, and their names."""

from saejax.matching.clusters.results import ClusteredDictionary, ClusterResults
from saejax.page.blocks import Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number

_GROUPS = 8  # groups of a dictionary that are shown
_DICTIONARIES = 3  # dictionaries whose groups are shown


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on groups of features for each unit of the stage."""
    return [_section(results) for results in findings.select(ClusterResults).values()]


def _section(results: ClusterResults) -> Section:
    intro = (
        f"Features are grouped (HDBSCAN) by firing together on text. {results.rule}. Shuffled data: the firings of "
        "each feature moved along the text."
    )
    columns = {
        "Dictionary": lambda clustered: clustered.name,
        "Tokens": lambda clustered: f"{clustered.tokens:,}",
        "Features": lambda clustered: f"{clustered.features:,}",
        "In groups": lambda clustered: f"{clustered.grouped:,}",
        "Groups": lambda clustered: f"{clustered.count:,}",
        "Stable": lambda clustered: f"{clustered.stable_groups:,}",
        "Overlap above": lambda clustered: number(clustered.bar),
        "Groups of shuffled data": lambda clustered: number(clustered.count_null, 1),
    }
    note = "Features: those that fire often enough to be compared. Overlap above: of a stable group."
    table = Table.of("Groups of features", [(clustered,) for clustered in results.dictionaries], columns, note=note)
    shown = [clustered for clustered in results.dictionaries if clustered.stable_groups][:_DICTIONARIES]
    return Section("Feature clusters", (Text(intro), table, *map(_groups_table, shown)))


def _groups_table(dictionary: ClusteredDictionary) -> Table:
    columns = {
        "Group": lambda group: group.name,
        "Features": lambda group: f"{len(group.features):,}",
        "Mean similarity": lambda group: number(group.mean_similarity),
        "Overlap": lambda group: number(group.overlap),
        "Most central features": lambda group: ", ".join(map(str, group.features[:6])),
    }
    note = (
        "Stable groups, largest first, named by the label of their most central feature that has one. Mean similarity: "
        "correlation of two of its features' firings. Overlap: with the most similar group of a bootstrap sample, mean."
    )
    rows = [(group,) for group in dictionary.largest if group.stable][:_GROUPS]
    return Table.of(f"Stable groups of {dictionary.name}", rows, columns, words={"Most central features"}, note=note)

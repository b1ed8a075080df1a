"""The report on what features mean: how many have a label, and how good labels are beside their controls."""

import os
from urllib.parse import quote

from saejax.dictionaries import stacks
from saejax.interpret.results import AtlasResults, InterpretedDictionary, InterpretResults
from saejax.page.document import Links, Section, Text
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number, percent


def sections(found: Findings, draw: Draw) -> list[Section]:
    """A table of the dictionaries that were interpreted; no section if there are none."""
    members = [
        (stacks.full_name(results.kind, member.name), member)
        for results in found.each(InterpretResults).values()
        for member in results.members
    ]
    if not members:
        return []
    intro = (
        "For every feature the simple detector that finds its firings best was searched on the training text: a few "
        "tokens, what tokens look like, the tokens before, positions, the token that follows. F1 is that of the "
        "detector on held-out text, which the search did not see. It is the feature's label if the lower end of its "
        "95 % interval lies above the F1 of another feature's label, and above what 95 % of random directions that "
        "fire about as often reach by the same search. A label says where a feature fires, not what it does."
    )
    columns = (
        "Dictionary",
        "Features that fire",
        "With a label",
        "Mean F1",
        "Other labels",
        "Random",
        "Random labelled",
    )
    note = (
        "Mean F1: over all features that fire, labelled or not. Other labels: with the label of another feature that "
        "fires about as often. Random: of random directions that fire as often; their labels are mistakes."
    )
    return [
        Section("What features mean", (Text(intro), Table("Labels", columns, tuple(map(_row, members)), note=note)))
    ]


def _row(named: tuple[str, InterpretedDictionary]) -> tuple[str, ...]:
    name, member = named
    own, random = member.found, member.random
    return (
        name,
        f"{own.features:,} of {member.features:,}",
        f"{own.labelled:,} ({percent(own.share)})",
        *(number(one) for one in (own.mean_f1, member.shuffled_f1, random.mean_f1)),
        percent(random.share, 1),
    )


def links(found: Findings, draw: Draw) -> list[Section]:
    """Where the pages of all features are; no section if there are none."""
    items = []
    for unit, results in found.each(AtlasResults).items():
        for member in results.members:
            page = found.folders[f"atlas/{unit}"] / member.folder / "index.html"
            address = quote(os.path.relpath(page, found.report).replace(os.sep, "/"))
            items.append((f"{member.dictionary}: {member.features:,} features", address))
    return [Section("All features", (Links("Pages of every feature", tuple(items)),), level=3)] if items else []

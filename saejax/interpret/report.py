"""The report on what features mean: how many have a label, and how good labels are beside their controls."""

from saejax.dictionaries import stacks
from saejax.interpret.results import AtlasResults, FrozenControl, InterpretedDictionary, InterpretResults, LabelCounts
from saejax.page.blocks import Links, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, number, percent


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
    columns = ("Dictionary", "Features that fire", "With a label", "95 %", "Mean F1", "95 %", "Other labels")
    note = (
        "Mean F1: over all features that fire, labelled or not; intervals are over features. Other labels: with the "
        "label of another feature that fires about as often. Random directions fire as often as the features do; their "
        "labels are mistakes. Frozen-random: a dictionary as large and as sparse whose directions were drawn and whose "
        "decoder alone was fitted, searched and judged like the dictionary itself. What it reaches owes nothing to "
        "training."
    )
    rows = [row for name, member in members for row in _rows(name, member)]
    fits = [Text(_fit(name, member.frozen)) for name, member in members if member.frozen]
    table = Table("Labels", columns, tuple(rows), note=note)
    return [Section("What features mean", (Text(intro), table, *fits))]


def _rows(name: str, member: InterpretedDictionary) -> list[tuple[str, ...]]:
    """The dictionary's row, and those of its controls."""
    rows = [_row(name, member.found, member.features, member.shuffled_f1)]
    if frozen := member.frozen:
        rows.append(_row(f"{name}: frozen-random", frozen.labels, member.features, frozen.shuffled_f1))
    return [*rows, _row(f"{name}: random directions", member.random, member.random.features, None)]


def _row(name: str, counts: LabelCounts, features: int, shuffled_f1: float | None) -> tuple[str, ...]:
    share, f1 = counts.share_interval, counts.f1_interval
    return (
        name,
        f"{counts.features:,} of {features:,}",
        f"{counts.labelled:,} ({percent(counts.share, 1)})",
        f"{percent(share.low, 1)} to {percent(share.high, 1)}" if share else MISSING,
        number(counts.mean_f1, 3),
        f"{number(f1.low, 3)} to {number(f1.high, 3)}" if f1 else MISSING,
        number(shuffled_f1, 3),
    )


def _fit(name: str, frozen: FrozenControl) -> str:
    """How like the frozen-random dictionary is to the one it stands beside."""
    return (
        f"{name} rebuilds {percent(frozen.own_explained_variance, 1)} of the variance of held-out tokens with "
        f"{number(frozen.own_l0, 1)} features a token, the frozen-random dictionary "
        f"{percent(frozen.explained_variance, 1)} with {number(frozen.l0, 1)}."
    )


def links(found: Findings, draw: Draw) -> list[Section]:
    """Where the pages of all features are; no section if there are none."""
    items = []
    for unit, results in found.each(AtlasResults).items():
        for member in results.members:
            page = found.folders[f"atlas/{unit}"] / member.folder / "index.html"
            address = found.address(page)
            items.append((f"{member.dictionary}: {member.features:,} features", address))
    return [Section("All features", (Links("Pages of every feature", tuple(items)),), level=3)] if items else []

"""The report's sections on labels by rules and by a language model: how many features have one, beside controls."""

import functools
from collections.abc import Callable, Sequence

from saejax.dictionaries.names import full_name
from saejax.interpret.held_out import MIN_FIRINGS
from saejax.interpret.results import (
    AtlasResults,
    ExplainedDictionary,
    ExplainResults,
    InterpretedDictionary,
    InterpretResults,
    LabelCounts,
    ReviewedFeatures,
)
from saejax.page.blocks import Block, Links, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import MISSING, Table, interval, number, percent
from saejax.wording import counted


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section with a table of the interpreted dictionaries; none if there are none."""
    members = [
        (full_name(results.kind, member.name), member)
        for results in findings.select(InterpretResults).values()
        for member in results.members
    ]
    if not members:
        return []
    intro = (
        "For every feature we searched, on training text, for the rule that best predicts where it fires: a few "
        "tokens, token shapes, the tokens before, positions, the next token. Its F1 is measured on held-out text. "
        "The rule is the feature's label if the lower end of the F1's 95 % interval is above the F1 of another "
        "feature's label, and above that of 95 % of random directions that fire about as often, found by the same "
        "search. A label says where a feature fires, not what it does."
    )
    columns = {
        "Dictionary": lambda name, counts, features, variance: name,
        "Live features": lambda name, counts, features, variance: f"{counts.features:,} of {features:,}",
        "With a label": lambda name, counts, features, variance: f"{counts.labelled:,}",
        "Share [95 %]": lambda name, counts, features, variance: interval(counts.share, 3),
        "Mean F1 [95 %]": lambda name, counts, features, variance: interval(counts.f1, 3),
        "Other labels": lambda name, counts, features, variance: number(counts.shuffled_f1, 3),
        "Explained variance": lambda name, counts, features, variance: percent(variance, 1),
    }
    note = (
        "Mean F1: over all live features, labelled or not; intervals are over features. Other labels: with the label "
        "of another feature that fires about as often. Random directions fire as often as the features; their labels "
        "are false positives. Frozen-random: a dictionary of the same size and sparsity with a random encoder and a "
        "fitted decoder, searched and scored in the same way. Its scores owe nothing to training."
    )
    rows = [row for name, member in members for row in _rows(name, member)]
    table = Table.of("Labels", rows, columns, note=note)
    return [Section("What features mean", (Text(intro), table, *_categories(members)))]


def _rows(name: str, member: InterpretedDictionary) -> list[tuple[str, LabelCounts, int, float | None]]:
    """Return a dictionary and its controls: name, counts, number of features, explained variance."""
    return [
        (name, member.labels, member.features, member.explained_variance),
        (f"{name}: frozen-random", member.frozen, member.features, member.frozen_explained_variance),
        (f"{name}: random directions", member.random, member.random.features, None),
    ]


def _categories(members: Sequence[tuple[str, InterpretedDictionary]]) -> list[Table]:
    """Return a table of associations with prompt categories; none where no dictionary has any prompts."""
    rows = [(name, member.categories) for name, member in members if member.categories]
    columns = {
        "Dictionary": lambda name, counts: name,
        "Prompts": lambda name, counts: f"{counts.prompts:,}",
        "Tests per feature": lambda name, counts: str(counts.tests),
        "Features with a category": lambda name, counts: (
            f"{counts.features:,} of {counts.live:,}" if counts.tests else MISSING
        ),
        "Shuffled": lambda name, counts: f"{counts.shuffled:,}" if counts.tests else MISSING,
    }
    note = (
        "A feature has a category if it fires on more of the prompts of a behaviour or benchmark than of all others, "
        "or on more of its right than of its wrong answers or the reverse (Fisher's exact test, false discovery rate "
        "of 5 % over all features and tests). Shuffled: features with a category after categories and answers were "
        "permuted. A dash: no category has enough prompts on both sides. Prompts of a category share words: a category "
        "says what a feature fires on, not what it does."
    )
    return [Table.of("Prompt categories", rows, columns, note=note)] if rows else []


def links(findings: Findings, draw: Draw) -> list[Section]:
    """Return links to the pages of all features; none if there are none."""
    items, sheets = list[tuple[str, str]](), list[tuple[str, ReviewedFeatures]]()
    for unit, results in findings.select(AtlasResults).items():
        for member in results.members:
            address = findings.address(findings.folders[f"atlas/{unit}"] / member.folder / "index.html")
            items.append((f"{member.dictionary}: {counted(member.features, 'feature')}", address))
            sheets += [(member.dictionary, sheet) for sheet in member.reviewed]
    if not items:
        return []
    blocks: tuple[Block, ...] = (Links("Pages of every feature", tuple(items)),)
    if sheets:
        columns = {
            "Dictionary": lambda name, sheet: name,
            "Behaviour": lambda name, sheet: sheet.behaviour,
            "Top features reviewed": lambda name, sheet: f"{sheet.reviewed} of {sheet.features}",
        }
        note = (
            "The atlas has a sheet of each behaviour's top features for people to read, review/BEHAVIOUR.csv; a filled "
            "copy is given to --atlas.labels, and its names are used on all pages."
        )
        blocks += (Table.of("Features read by people", sheets, columns, note=note),)
    return [Section("All features", blocks, level=3)]


def explain_sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section with a table of the judged dictionaries; none if there are none."""
    units = list(findings.select(ExplainResults).values())
    rows = [(full_name(results.kind, member.name), member) for results in units for member in results.members]
    names = dict.fromkeys(name for _, member in rows for name in member.scores)
    if not rows:
        return []
    intro = (
        f"A language model ({units[0].model}) wrote labels from contexts in training text and judged them on contexts "
        "in held-out text: some from every tenth of a feature's firings, as many in which it does not fire, and near "
        "misses, in which similar features fire and it does not. Detection: in which contexts does the feature with "
        "this label fire? Near misses: the same, against these alone. Fuzzing: are the marked tokens those on which it "
        "fires? Intruder: which context does not belong to others, without a label? Simulation: correlation with the "
        "activation predicted on each token. A label is kept if the lower ends of the 95 % intervals of its balanced "
        "accuracy in detection and on near misses are above those of another feature's label and above one "
        f"half. Features with fewer than {MIN_FIRINGS} held-out firings, or none in training text, are skipped."
    )
    columns: dict[str, Callable[..., str]] = {
        "Dictionary": lambda name, member: name,
        "Labels kept": lambda name, member: (
            f"{member.kept} of {member.judged}" + (f" ({member.untold} not testable)" if member.untold else "")
        ),
        **{f"{name.capitalize()} [95 %]; control": functools.partial(_score_cell, name) for name in names},
        "Unparsed": lambda name, member: percent(member.unparsed),
    }
    note = (
        "Means over features: balanced accuracies, of intruder the accuracy, of simulation the correlation; intervals "
        "by bootstrap over features. Control: with the label of another feature that fires about as often, or guessing "
        "the intruder. Unparsed replies are excluded. Not testable: without a label, a reply that could be parsed, or "
        "another label to compare with."
    )
    table = Table.of("Scores of the labels", rows, columns, note=note)
    return [Section("Labels by a language model", (Text(intro), table))]


def _score_cell(score: str, name: str, member: ExplainedDictionary) -> str:
    mean = member.scores.get(score)
    return f"{interval(mean.value)}; {number(mean.control)}" if mean else MISSING

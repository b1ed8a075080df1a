"""The pages of circuits: one of each behaviour, their index, and the part of the report.

A behaviour's page opens with its circuit. The index and the report have a table, links to the pages, and published
claims with what was measured. Files of a behaviour, in the unit's folder:

<behaviour>.html            the page
<behaviour>.svg, .png       the picture
<behaviour>-groups.json     the groups, to be edited and given to ``--circuits.groups``
review/<behaviour>.csv      a line for each feature of the groups, where a person fills in labels, to be given to
                            ``--graph.labels``
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.circuits.edges import LEAST_DOSE, Edge
from saejax.circuits.groups import ROLE_WORDS, Key, as_json, name_feature
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.dictionaries.labels import COLUMNS
from saejax.files import write_text
from saejax.interpret.labels import write_sheet
from saejax.interventions.answers import LEAST_PROMPTS
from saejax.page import style
from saejax.page.blocks import Block, Links, Picture, Text
from saejax.page.document import Section, to_html
from saejax.page.findings import Draw, Findings
from saejax.page.strips import Example, Strips
from saejax.page.tables import Table, answer, interval, number, percent
from saejax.page.words import WEAK, mark_weak, warn_weak
from saejax.page.words import behaviour as title
from saejax.runner.labels import names_of_layers
from saejax.stages.circuits import figure
from saejax.stages.circuits.claims import CONFIRMED, NOT_TESTABLE, compare_claims
from saejax.tasks.behaviours import Prompt
from saejax.unicode import visible
from saejax.wording import counted

_COLOURS = {figure.CARD: "--card", figure.SOFT: "--soft"}
_SHEET = (*COLUMNS, "dictionary", "automatic_label", "group", "role", "promotes", "contexts")
_EDITS = dict(
    total="Without the group",
    direct="Without the group, all other groups held",
    swap="The group as in the counterpart",
)
_EDGE_COLUMNS: dict[str, Callable[[Edge], str]] = {
    "From": lambda edge: edge.source,
    "To": lambda edge: edge.target,
    "Drawn": lambda edge: answer(edge.drawn if edge.is_testable else None, "not testable"),
    "Effect": lambda edge: edge.in_unit(interval, edge.effect),
    "Random": lambda edge: f"{edge.in_unit(number, edge.random)} ± {edge.in_unit(number, edge.random_spread)}",
    "Placebo": lambda edge: f"{edge.in_unit(number, edge.placebo)} ± {edge.in_unit(number, edge.placebo_spread)}",
    "Over random": lambda edge: edge.in_unit(interval, edge.over_random),
    "Over placebo": lambda edge: edge.in_unit(interval, edge.over_placebo),
    "Dose": lambda edge: percent(edge.dose),
}
_COLUMNS: dict[str, Callable[[str, CircuitResults], str]] = {
    "Logit difference": lambda name, circuit: number(circuit.logit_diff),
    "Features that return": lambda name, circuit: str(len(circuit.returning)),
    "Groups": lambda name, circuit: str(len(circuit.groups)),
    "Edges drawn": lambda name, circuit: _drawn_of_tested(circuit, "direct"),
    "Needed": lambda name, circuit: _drawn_of_tested(circuit, "total"),
    "Carry": lambda name, circuit: _drawn_of_tested(circuit, "swap"),
}


def _drawn_of_tested(circuit: CircuitResults, edit: str) -> str:
    """Return how many effects of an edit are drawn, of those that could be tested."""
    tested = sum(edge.is_testable for edge in circuit.edges if edge.edit == edit)
    return f"{len(circuit.drawn(edit))} of {tested}" if tested else "not testable"


def write_behaviour(
    folder: Path,
    name: str,
    circuit: CircuitResults,
    details: Mapping[Feature, FeatureDetails],
    prompt: Prompt,
    transcoders: str,
    by_hand: Mapping[Feature, str],
    weak: str = "",
) -> None:
    """Write all files of a behaviour.

    Args:
      folder: folder of the unit.
      name: name of the behaviour.
      circuit: the circuit of the behaviour.
      details: labels and contexts of the features.
      prompt: a prompt that is shown as an example.
      transcoders: name of the set of transcoders.
      by_hand: labels that people have given; in the sheet, automatic labels are in another column.
      weak: why the behaviour is weak; "": it is not.
    """
    write_text(folder / f"{name}-groups.json", as_json(name, circuit.groups))
    keys = [(group, key) for group in circuit.groups for key in group.members]
    names = {key: visible(name_feature(key, details[key.address], circuit.layers)) for _, key in keys}
    lead = [
        f"Prompts such as “{visible(prompt.text)}” (right: “{visible(prompt.correct.strip())}”, wrong: "
        f"“{visible(prompt.wrong.strip())}”). A group is a set of features that return over {circuit.traced} train "
        f"prompts; an arrow is the effect, measured on {circuit.measured} test prompts, of removing its source while "
        "all other groups keep their activations. Differing words are those that differ between a prompt and its "
        "counterpart, which asks for the wrong answer."
    ]
    if weak:
        lead.insert(0, warn_weak(weak))
    if not circuit.drawn():
        direct = [edge.is_testable for edge in circuit.edges if edge.edit == "direct"]
        lead.append(
            "No arrow is drawn: with all other groups held, no effect exceeds its controls "
            f"({direct.count(True)} tested, {direct.count(False)} not testable)."
        )
    contexts = Text("Contexts are from files of the set, or else from the embedded corpus and the traced prompts.")
    parts = [
        Section("The circuit", (_draw_picture(folder, name, circuit, names), *_edge_tables(circuit))),
        Section("Features of the groups", (contexts,)),
    ]
    for group in circuit.groups:
        strips = tuple(_feature_strips(key, names[key], details[key.address]) for key in group.members)
        parts.append(Section(f"Group: {group.name}", strips, level=3))
    footer = (
        f"Groups: {name}-groups.json; edited, they go to --circuits.groups. Labels: fill in review/{name}.csv and give "
        "it to --graph.labels. Made by saejax."
    )
    write_text(folder / f"{name}.html", to_html(f"Circuit: {mark_weak(title(name), weak)}", lead, parts, footer))

    dictionaries = names_of_layers([transcoders], {key.layer for _, key in keys})
    rows: list[dict[str, Any]] = []
    for group, key in keys:
        described, label = details[key.address], by_hand.get(key.address, "")
        rows.append(
            dict(
                feature=key.feature, label=label, dictionary=dictionaries[key.layer],
                automatic_label="" if label else described.label, group=group.name, role=key.role,
                promotes=visible(" ".join(described.top_logits)),
                contexts=" | ".join(map(_one_line, described.examples)),
            )
        )  # fmt: skip
    write_sheet(folder / "review" / f"{name}.csv", rows, _SHEET)


def _one_line(context: Mapping[str, list]) -> str:
    """Return a context on one line, its strongest token in double brackets."""
    peak = context["activations"].index(max(context["activations"]))
    pieces = [f"[[{token}]]" if n == peak else token for n, token in enumerate(context["tokens"])]
    return visible("".join(pieces))


def _draw_picture(folder: Path, name: str, circuit: CircuitResults, names: Mapping[Key, str]) -> Picture:
    """Draw a circuit, write the picture next to its page, and return it for the page."""
    outline = figure.read_outline(name)
    svg = style.save(figure.draw_circuit(circuit, names, outline), folder, name)
    caption = (
        "Boxes are groups of features, with the names of the most influential ones, from below by their mean layer. A "
        "feature without a label is named by the tokens on which it fires most strongly; → stands before tokens that "
        "it promotes. An arrow says what vanishes without its source: of a group, the share of its activation; of the "
        "answer, logit difference. Blue supports, orange (broken) inhibits."
    )
    if outline:
        caption += (
            f" To the right, the outline of the circuit that {outline['source']} describe for “{outline['prompt']}”; "
            "the sizes of its effects are not drawn."
        )
    arrows = "; ".join(f"{edge.source} to {edge.target} {number(edge.effect.mean)}" for edge in circuit.drawn())
    alt = f"Circuit of {title(name)} with {counted(len(circuit.groups), 'group')}. Edges: {arrows or 'none'}."
    # Narrow screens scroll: text of this size is still read where the picture is 60 rem wide.
    svg_inline = style.inline(svg, f"circuit_{name}", alt, _COLOURS)
    return Picture(f"circuit_{name}", svg_inline, caption, alt, "svg", "max(100%, 58rem)")


def _edge_tables(circuit: CircuitResults) -> list[Block]:
    """Return a table of every measured effect for each edit, with its controls and intervals."""
    if not circuit.groups:
        return [Text("No feature returned over the traced prompts, so there is no group and nothing was measured.")]
    blocks: list[Block] = []
    for edit, heading in _EDITS.items():
        rows = [(edge,) for edge in sorted(circuit.edges, key=lambda edge: not edge.drawn) if edge.edit == edit]
        if rows:
            blocks.append(Table.of(heading, rows, _EDGE_COLUMNS, {"To", "Drawn"}, stack=False))
    level = circuit.edges[0].level if circuit.edges else 0.95
    note = (
        "To the answer the effect is the fall of the logit difference, to a group the share of its activation that "
        f"vanishes. Intervals are at {percent(level, 2)}, so that all of a behaviour hold together at 95 %. Random and "
        "placebo sets are other features at the same positions and layers, placebo ones chosen for unrelated tokens, "
        "changed to the group's dose; ± is the standard deviation between such sets of one prompt. An edge is drawn "
        "where the effect exceeds both, by more than sets differ from each other, unless they reach less than "
        f"{percent(LEAST_DOSE)} of the dose (Dose). Not testable: an effect whose controls reach less, or that was "
        f"measured on fewer than {LEAST_PROMPTS} prompts, as a group may be silent on some."
    )
    return [*blocks, Text(note)]


def _feature_strips(key: Key, name: str, details: FeatureDetails) -> Strips:
    """Return a feature's contexts, with a note on its place and the tokens that it promotes."""
    note = f"layer {key.layer}, feature {key.feature}, at: {ROLE_WORDS[key.role]}"
    if promoted := ", ".join(f"“{visible(token)}”" for token in details.top_logits[:5]):
        note += f"; promotes {promoted}"
    if not details.examples:
        note += "; it does not fire in the searched text"
    examples = []
    for context in details.examples:
        acts = tuple(context["activations"])
        examples.append(Example(tuple(context["tokens"]), acts, acts.index(max(acts)), "strongest of its text"))
    return Strips(name, note, tuple(examples))


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return what was measured in each behaviour, and a row for each published claim; nothing without circuits."""
    units = findings.select(CircuitsResults)
    folder = findings.folders.get("circuits", Path())
    return circuit_sections(units[""], lambda file: findings.address(folder / file)) if units else []


def write_index(folder: Path, results: CircuitsResults) -> None:
    """Write ``index.html`` in a unit's folder: the same sections, where there is no report."""
    parts = circuit_sections(results, quote)
    lead = [part.lead for part in parts if part.lead]
    write_text(folder / "index.html", to_html("Circuits of behaviours", lead, parts, "Made by saejax."))


def circuit_sections(results: CircuitsResults, address: Callable[[str], str]) -> list[Section]:
    """Return the sections on circuits; ``address`` gives the address of a file of the unit on the page."""
    note = (
        "Counts are of those that could be tested. Needed: groups without which the logit difference falls more than "
        "without control sets of the same dose. Carry: groups that move the answer to the counterpart's when they take "
        "its activations."
    )
    if results.weak:
        note += f" {WEAK}"
    columns = {"Behaviour": lambda name, circuit: mark_weak(title(name), results.weak.get(name))} | _COLUMNS
    blocks: list[Block] = [
        Table.of("Circuits", results.behaviours.items(), columns, note=note),
        Links("Pages of the circuits", tuple((title(name), address(f"{name}.html")) for name in results.behaviours)),
    ]
    if results.left_out:
        left_out = "; ".join(f"{title(name)}: {why}" for name, why in results.left_out.items())
        blocks.append(Text(f"Left out: {left_out}."))
    comparisons = compare_claims(results)
    claims = Table(
        "Published claims and what was measured here",
        ("Claim", "Published", "Here", "Evidence", "Source"),
        tuple(
            (comparison.id, comparison.claim, comparison.outcome, comparison.evidence, comparison.source)
            for comparison in comparisons
        ),
        frozenset({1, 2, 3, 4}),
        note="Confirmed takes an edge that is drawn, so one that exceeds random and placebo features at equal dose. "
        "Effects on the answer are logits, those on a group a share of its activation. The published studies are of "
        "other, larger models.",
    )
    outcomes, count = [comparison.outcome for comparison in comparisons], len(results.behaviours)
    untested = outcomes.count(NOT_TESTABLE)
    lead = (
        f"Features that return over prompts were grouped in {counted(count, 'behaviour')} and each group's "
        f"effect was measured. Of {len(outcomes) - untested} published claims about such circuits that could be "
        f"tested, {outcomes.count(CONFIRMED)} are confirmed on this model; {untested} others could not be tested."
    )
    return [
        Section("Circuits", tuple(blocks), lead=lead),
        Section("Circuits compared with published ones", (claims,), level=3),
    ]

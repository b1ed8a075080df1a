"""The pages of circuits: one of each behaviour, their index, and the part of the report.

A behaviour's page opens with its circuit. The index and the report have a table, links to the pages, and published
claims with what was measured.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.circuits import figure
from saejax.circuits.claims import CONFIRMED, compare_claims
from saejax.circuits.edges import LEAST_DOSE, Edge
from saejax.circuits.groups import ROLE_WORDS, Key, name_feature
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.files import write_text
from saejax.page import style
from saejax.page.blocks import Block, Links, Picture, Text
from saejax.page.document import Section, to_html
from saejax.page.findings import Draw, Findings
from saejax.page.strips import Example, Strips
from saejax.page.tables import Table, answer, interval, number, percent, visible
from saejax.page.words import behaviour as title
from saejax.tasks.behaviours import Prompt

_COLOURS = {figure.CARD: "--card", figure.SOFT: "--soft", figure.LINE: "--line"}
_EDITS = dict(
    total="Without the group",
    direct="Without the group, all other groups held",
    swap="The group as in the counterpart",
)
_COLUMNS = {
    "From": lambda edge: edge.source,
    "To": lambda edge: edge.target,
    "Effect": lambda edge: edge.in_unit(interval, edge.effect),
    "Random": lambda edge: edge.in_unit(number, edge.random),
    "Placebo": lambda edge: edge.in_unit(number, edge.placebo),
    "Over random": lambda edge: edge.in_unit(interval, edge.over_random),
    "Over placebo": lambda edge: edge.in_unit(interval, edge.over_placebo),
    "Dose": lambda edge: percent(edge.dose),
    "Drawn": lambda edge: answer(edge.drawn),
}
_CONTEXTS = (
    "Each feature with the contexts in which it fires most strongly, from files of its set or else from the embedded "
    "corpus and the traced prompts, and the tokens that it promotes."
)


def write_page(
    path: Path, name: str, circuit: CircuitResults, details: Mapping[Feature, FeatureDetails], prompt: Prompt
) -> None:
    """Write a behaviour's page, which opens with the circuit, and the picture as ``.svg`` and ``.png``.

    Args:
      path: of the page.
      name: of the behaviour.
      circuit: its results.
      details: labels and contexts of the features.
      prompt: an example.
    """
    keys = [key for group in circuit.groups for key in group.members]
    names = {key: visible(name_feature(key, details[key.address], circuit.layers)) for key in keys}
    lead = [
        f"Prompts such as “{visible(prompt.text)}” (right: “{visible(prompt.correct.strip())}”, wrong: "
        f"“{visible(prompt.wrong.strip())}”). {circuit.traced} train prompts chose the features, "
        f"{circuit.measured} test prompts measured what they do. A group is a set of features that return over "
        "prompts; an arrow is the measured effect of removing its source while all other groups keep their "
        "activations. Positions are of three roles: words that differ between a prompt and its counterpart, which asks "
        "for the wrong answer; the last position; and other words."
    ]
    if not circuit.drawn():
        lead.append("With all other groups held, no effect exceeds its controls, so no arrow is drawn.")
    sections = [
        Section("The circuit", (_draw_picture(path, name, circuit, names), *_edge_tables(circuit))),
        Section("Features of the groups", (Text(_CONTEXTS),)),
    ]
    for group in circuit.groups:
        strips = [_feature_strips(key, names[key], details[key.address]) for key in group.members]
        sections.append(Section(f"Group: {group.name}", tuple(strips), level=3))
    footer = (
        f"Groups: {path.stem}-groups.json, {'a proposal' if circuit.proposed else 'as given'}; edited, they go to "
        f"--circuits.groups. Labels: fill in review/{path.stem}.csv and give it to --graph.labels. Made by saejax."
    )
    write_text(path, to_html(f"Circuit: {title(name)}", lead, sections, footer))


def _draw_picture(path: Path, name: str, circuit: CircuitResults, names: Mapping[Key, str]) -> Picture:
    """Draw a circuit, write the picture next to its page, and return it for the page."""
    outline = figure.read_outline(name)
    svg = style.save(figure.draw_circuit(circuit, names, outline), path.parent, path.stem)
    caption = (
        "Boxes are groups of features with the names of the most influential ones, from below by their mean layer, "
        "across by the positions at which they stand. A feature without a label is named by the tokens on which it "
        "fires most strongly; → stands before tokens that it promotes. An arrow says what vanishes without its source: "
        "of a group, the share of its activation; of the answer, logit difference. Blue supports, orange (broken) "
        "inhibits. Arrows are drawn where the effect exceeds random and placebo features at the same dose."
    )
    if outline:
        caption += (
            f" To the right, the outline of the circuit that {outline['source']} describe for “{outline['prompt']}”; "
            "the sizes of its effects are not drawn."
        )
    arrows = "; ".join(f"{edge.source} to {edge.target} {number(edge.effect.mean)}" for edge in circuit.drawn())
    alt = f"Circuit of {title(name)} with {len(circuit.groups)} groups. Edges: {arrows or 'none'}."
    # Narrow screens scroll: text of this size is still read where the picture is 60 rem wide.
    svg_inline = style.inline(svg, f"circuit_{name}", alt, _COLOURS)
    return Picture(f"circuit_{name}", svg_inline, caption, alt, "svg", "max(100%, 58rem)")


def _edge_tables(circuit: CircuitResults) -> list[Block]:
    """Return a table of every measured effect for each edit, with its controls and intervals."""
    if not circuit.groups:
        return [Text("No feature returned over the traced prompts, so there is no group and nothing was measured.")]
    blocks: list[Block] = []
    for edit, heading in _EDITS.items():
        edges: list[tuple[Edge]] = [(edge,) for edge in circuit.edges if edge.edit == edit]
        if edges:
            edges.sort(key=lambda row: not row[0].drawn)
            blocks.append(Table.of(heading, edges, _COLUMNS, {"To", "Drawn"}, stack=False))
    level = circuit.edges[0].level if circuit.edges else 0.95
    note = (
        "To the answer the effect is the fall of the logit difference, to a group the share of its activation that "
        f"vanishes. Intervals are at {percent(level, 2)}, so that all of a behaviour hold together at 95 %. Random and "
        "placebo sets are other features at the same positions and layers, placebo ones chosen for unrelated tokens; "
        f"both are changed to the group's dose. Where they reach less than {percent(LEAST_DOSE)} of it (Dose), no edge "
        "is drawn."
    )
    return [*blocks, Text(note)]


def _feature_strips(key: Key, name: str, details: FeatureDetails) -> Strips:
    promoted = ", ".join(f"“{visible(token)}”" for token in details.top_logits[:5])
    note = f"layer {key.layer}, feature {key.feature}, at: {ROLE_WORDS[key.role]}"
    note += f"; promotes {promoted}" if promoted else ""
    note += "" if details.examples else "; it does not fire in the searched text"
    examples = []
    for context in details.examples:
        acts = tuple(map(float, context["activations"]))
        tokens = tuple(map(str, context["tokens"]))
        examples.append(Example(tokens, acts, acts.index(max(acts)), "strongest of its text"))
    return Strips(name, note, tuple(examples))


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return what was measured in each behaviour, and a row for each published claim; nothing without circuits."""
    parts = []
    for unit, results in findings.each(CircuitsResults).items():
        folder = findings.folders["/".join(filter(None, ("circuits", unit)))]
        parts += circuit_sections(results, folder, findings.report)
    return parts


def write_index(folder: Path, results: CircuitsResults) -> None:
    """Write ``index.html`` in a unit's folder: the same sections, where there is no report."""
    parts = circuit_sections(results, folder, folder)
    lead = [part.lead for part in parts if part.lead]
    write_text(folder / "index.html", to_html("Circuits of behaviours", lead, parts, "Made by saejax."))


def circuit_sections(results: CircuitsResults, folder: Path, report: Path) -> list[Section]:
    """Return the sections on a unit's circuits.

    Args:
      results: of the unit.
      folder: its folder.
      report: folder of the page that shows them.
    """
    columns = {
        "Behaviour": lambda name, circuit: title(name),
        "Logit difference": lambda name, circuit: number(circuit.logit_diff),
        "Features that return": lambda name, circuit: str(len(circuit.returning)),
        "Groups": lambda name, circuit: str(len(circuit.groups)),
        "Edges drawn": lambda name, circuit: str(len(circuit.drawn())),
        "Needed": lambda name, circuit: str(len(circuit.drawn("total"))),
        "Carry": lambda name, circuit: str(len(circuit.drawn("swap"))),
    }
    note = (
        "Needed: groups without which the logit difference falls more than without control sets of the same dose. "
        "Carry: groups that move the answer to the counterpart's when they take its activations."
    )
    pages = tuple(
        (title(name), quote(Path(os.path.relpath(folder / f"{name}.html", report)).as_posix()))
        for name in results.behaviours
    )
    blocks: list[Block] = [
        Table.of("Circuits", results.behaviours.items(), columns, note=note),
        Links("Pages of the circuits", pages),
    ]
    if results.left_out:
        left_out = "; ".join(f"{title(name)}: {why}" for name, why in results.left_out.items())
        blocks.append(Text(f"Left out: {left_out}."))
    comparisons = compare_claims(results)
    claims = Table(
        "Published claims and what was measured here",
        ("Claim", "Published", "Here", "Evidence", "Source"),
        tuple((claim.id, claim.claim, claim.outcome, claim.evidence, claim.source) for claim in comparisons),
        frozenset({1, 2, 3, 4}),
        note="Confirmed takes an edge that is drawn, so one that exceeds random and placebo features at equal dose. "
        "Effects on the answer are logits, those on a group a share of its activation. The published studies are of "
        "other, larger models.",
    )
    lead = (
        f"Features that return over prompts were grouped in {len(results.behaviours)} behaviours and each group's "
        f"effect was measured: {sum(claim.outcome == CONFIRMED for claim in comparisons)} of {len(comparisons)} "
        "published claims about such circuits are confirmed on this model."
    )
    return [
        Section("Circuits", tuple(blocks), lead=lead),
        Section("Circuits beside published ones", (claims,), level=3),
    ]

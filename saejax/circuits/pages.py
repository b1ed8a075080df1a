"""The page of a behaviour's circuit, and the tables that it shares with the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.circuits import figure as circuit_figure
from saejax.circuits.contexts import name_feature
from saejax.circuits.edges import ANSWER, LEAST_DOSE, Edge
from saejax.circuits.groups import ROLE_WORDS, parse_key
from saejax.circuits.results import CircuitResults, GroupResults
from saejax.files import write_text
from saejax.page import style
from saejax.page.blocks import Block, Picture, Text
from saejax.page.document import Section, to_html
from saejax.page.strips import Example, Strips
from saejax.page.tables import Table, answer, interval, number, percent, visible
from saejax.page.words import behaviour as title
from saejax.tasks.behaviours import Prompt

_COLOURS = {circuit_figure.CARD: "--card", circuit_figure.SOFT: "--soft", circuit_figure.LINE: "--line"}
_EDITS = dict(
    total="Without the group",
    direct="Without the group, all other groups held",
    swap="The group as in the counterpart",
)
_CONTEXTS = (
    "Each feature with the contexts in which it fires most strongly, from files of its set or else from the embedded "
    "corpus and the traced prompts, and the tokens that it promotes."
)


def write_page(
    path: Path,
    name: str,
    circuit: CircuitResults,
    details: Mapping[Feature, FeatureDetails],
    prompts: Sequence[Prompt],
) -> None:
    """Write a behaviour's page, which opens with the circuit, and the picture beside it as ``.svg``.

    Args:
      path: of the page.
      name: of the behaviour.
      circuit: its results.
      details: what is known of the features.
      prompts: that were measured.
    """
    names = {
        member: visible(name_feature(key, details[key[:2]], circuit.layers))
        for group in circuit.groups
        for member, key in ((member, parse_key(member)) for member in group.members)
    }
    lead = (
        f"Prompts such as “{visible(prompts[0].text)}” (right: “{visible(prompts[0].correct.strip())}”, wrong: "
        f"“{visible(prompts[0].wrong.strip())}”). {circuit.traced} train prompts chose the features, "
        f"{circuit.measured} test prompts measured what they do. A group is a set of features that return over "
        "prompts; an arrow is the measured effect of removing its source while all other groups keep their "
        "activations. Positions are of three roles: words that differ between a prompt and its counterpart, which asks "
        "for the wrong answer; the last position; and other words.",
        *(
            []
            if circuit.drawn()
            else ["With all other groups held, no effect exceeds its controls, so no arrow is drawn."]
        ),
    )
    sections = [
        Section("The circuit", (picture(path, name, circuit, names), *edge_tables(circuit))),
        Section("Features of the groups", (Text(_CONTEXTS),)),
        *(_group_section(group, names, details) for group in circuit.groups),
    ]
    footer = (
        f"Groups: {path.stem}-groups.json, {'a proposal' if circuit.proposed else 'as given'}; edited, they go to "
        f"--circuits.groups. Labels: fill in review/{path.stem}.csv and give it to --graph.labels. Made by saejax."
    )
    write_text(path, to_html(f"Circuit: {title(name)}", lead, sections, footer))


def picture(path: Path, name: str, circuit: CircuitResults, names: Mapping[str, str]) -> Picture:
    """Draw a circuit, write the picture next to its page, and return it for the page."""
    outline = circuit_figure.read_outline(name)
    svg = style.save(circuit_figure.draw_circuit(circuit, names, outline), path.parent, path.stem)
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


def edge_tables(circuit: CircuitResults) -> list[Block]:
    """Return a table of every measured effect for each edit, with its controls and intervals."""
    if not circuit.groups:
        return [Text("No feature returned over the traced prompts, so there is no group and nothing was measured.")]
    level = circuit.edges[0].level if circuit.edges else 0.95
    blocks: list[Block] = []
    for edit, heading in _EDITS.items():
        edges = [edge for edge in circuit.edges if edge.edit == edit]
        if edges:
            columns = ("From", "To", "Effect", "Random", "Placebo", "Over random", "Over placebo", "Dose", "Drawn")
            rows = tuple(sorted(map(_row, edges), key=lambda row: row[-1] != "yes"))
            blocks.append(Table(heading, columns, rows, frozenset({1, 8}), stack=False))
    note = (
        "To the answer the effect is the fall of the logit difference, to a group the share of its activation that "
        f"vanishes. Intervals are at {percent(level, 2)}, so that all of a behaviour hold together at 95 %. Random and "
        "placebo sets are other features at the same positions and layers, placebo ones chosen for unrelated tokens; "
        f"both are changed to the group's dose. Where they reach less than {percent(LEAST_DOSE)} of it (Dose), no edge "
        "is drawn."
    )
    return [*blocks, Text(note)]


def _row(edge: Edge) -> tuple[str, ...]:
    scale, digits = (1.0, 2) if edge.target == ANSWER else (100.0, 0)
    unit = "" if edge.target == ANSWER else " %"
    parts = (edge.effect, edge.over_random, edge.over_placebo)
    effect, over_random, over_placebo = (interval(part, digits, scale) + unit for part in parts)
    controls = (f"{number(value, digits, scale)}{unit}" for value in (edge.random, edge.placebo))
    return (
        edge.source, edge.target, effect, *controls, over_random, over_placebo, percent(edge.dose), answer(edge.drawn)
    )  # fmt: skip


def _group_section(group: GroupResults, names: Mapping[str, str], details: Mapping[Feature, FeatureDetails]) -> Section:
    strips = []
    for member in group.members:
        key = parse_key(member)
        feature_details = details[key[:2]]
        promoted = ", ".join(f"“{visible(token)}”" for token in feature_details.top_logits[:5])
        note = f"layer {key.layer}, feature {key.feature}, at: {ROLE_WORDS[key.role]}"
        note += f"; promotes {promoted}" if promoted else ""
        note += "" if feature_details.examples else "; it does not fire in the searched text"
        strips.append(Strips(names[member], note, tuple(map(_example, feature_details.examples))))
    return Section(f"Group: {group.name}", tuple(strips), level=3)


def _example(context: Mapping[str, list]) -> Example:
    acts = tuple(map(float, context["activations"]))
    peak = max(range(len(acts)), key=acts.__getitem__)
    return Example(0, 0, tuple(map(str, context["tokens"])), acts, peak, "strongest of its text")

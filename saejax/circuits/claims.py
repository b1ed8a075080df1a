"""Published claims about circuits, and what was measured of them here.

A claim is *confirmed* if the edges that it predicts are drawn, which takes an interval and two controls
(``edges.judge_edges``), or if features are shared beyond what unrelated behaviours share. It is *not seen* if they were
measured and are not drawn, and *not testable* where the model does not have the behaviour or this study has no test.
"""

import dataclasses
import importlib.resources
import itertools
import json
from collections.abc import Callable, Mapping

from saejax.circuits.edges import ANSWER, Edge
from saejax.circuits.groups import THIRDS, is_output, third_of
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.page.tables import interval, number, percent
from saejax.page.words import behaviour as title

CONFIRMED, NOT_SEEN, NOT_TESTABLE = "confirmed", "not seen", "not testable"
_LANGUAGES = ("antonym", "antonym_french", "antonym_spanish")
_NO_PAIRS = "It takes two languages and an unrelated behaviour that the model has."


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published claim, and what came of it here."""

    id: str  #: its name
    behaviour: str  #: that it is about; "": none of ours
    test: str  #: name of its test in ``TESTS``; "": there is none
    source: str  #: where it was published
    claim: str  #: in our words
    note: str = ""  #: what is not tested, or why nothing is
    outcome: str = ""  #: confirmed, not seen or not testable; "": not compared yet
    evidence: str = ""  #: for the outcome, in a sentence


def read_claims() -> list[Claim]:
    """Return the claims of ``data/claims.json``."""
    text = (importlib.resources.files(__package__) / "data" / "claims.json").read_text("utf-8")
    return [Claim(**fields) for fields in json.loads(text)]


def compare_claims(results: CircuitsResults) -> list[Claim]:
    """Return every claim with what was measured."""
    compared = []
    for claim in read_claims():
        outcome, evidence = NOT_TESTABLE, claim.note
        if claim.test and claim.behaviour in results.behaviours:
            outcome, evidence = TESTS[claim.test](results, results.behaviours[claim.behaviour])
            evidence = f"{evidence} {claim.note}".strip()
        elif claim.test:
            why = results.left_out.get(claim.behaviour, "the behaviour was not studied in this run")
            evidence = f"{title(claim.behaviour)}: {why}."
        compared.append(dataclasses.replace(claim, outcome=outcome, evidence=evidence))
    return compared


def _describe(*edges: Edge) -> str:
    """Return edges with their effects and controls in words."""
    return "; ".join(
        f"{edge.source} to {'the answer' if edge.target == ANSWER else edge.target}: "
        f"{edge.in_unit(interval, edge.effect)} (random {edge.in_unit(number, edge.random)}, "
        f"placebo {edge.in_unit(number, edge.placebo)})"
        for edge in edges
    )


def _steps(circuit: CircuitResults, role: str) -> dict[str, tuple[Edge, Edge]]:
    """Return the groups on a drawn path from a group of a role to the answer, each with both edges."""
    drawn, role_of = circuit.drawn(), {group.name: group.role for group in circuit.groups}
    onward = {edge.source: edge for edge in drawn if edge.target == ANSWER}
    # What reaches the answer through others, too: as often as there are groups, since no path is longer.
    for _ in circuit.groups:
        for edge in drawn:
            if edge.target in onward:
                onward.setdefault(edge.source, edge)
    return {
        edge.target: (edge, onward[edge.target])
        for edge in drawn
        if edge.target in onward and role_of[edge.source] == role
    }


def _through(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    for edges in _steps(circuit, "content").values():
        return CONFIRMED, f"{_describe(*edges)}."
    return NOT_SEEN, "No drawn path leads from what differs between prompts through another group to the answer."


def _through_entity(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    """Judge a step before the answer: a group that carries which answer it is, and is none of those that say it."""
    steps, carrying = _steps(circuit, "content"), {edge.source for edge in circuit.drawn("swap")}
    for group in circuit.groups:
        # What says the answer is no step: the claim is about one before it.
        if group.name in steps.keys() & carrying and not is_output(group, circuit.layers):
            evidence = _describe(*steps[group.name])
            return CONFIRMED, f"{evidence}; exchanged with the counterpart's, it moves the answer."
    return NOT_SEEN, "No group before those that say the answer is on a drawn path to it and carries which one it is."


def _meeting(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    content, context = _steps(circuit, "content"), _steps(circuit, "context")
    for name in content.keys() & context.keys():
        return CONFIRMED, f"{_describe(content[name][0], context[name][0], content[name][1])}."
    return NOT_SEEN, "No group on a drawn path to the answer is fed by both the content and the words around it."


def _direct(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    content = {group.name for group in circuit.groups if group.role == "content"}
    for edge in circuit.drawn():
        if edge.target == ANSWER and edge.source in content:
            return CONFIRMED, f"{_describe(edge)} while all other groups were held."
    return NOT_SEEN, "No group at the content acts on the answer while the other groups are held."


def _swap(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    if not circuit.swapped:
        return NOT_TESTABLE, "Prompts and counterparts differ in length, so nothing was exchanged."
    best = max(circuit.drawn("swap"), key=lambda edge: edge.effect.mean, default=None)
    if best is None:
        return NOT_SEEN, "No group moves the answer to the counterpart's when its activations are exchanged."
    evidence = f"Exchanged with the counterpart's activations, {_describe(best)}"
    if best.effect.mean > circuit.logit_diff:
        return CONFIRMED, f"{evidence}, which turns the mean answer around."
    of_all = f"of a mean logit difference of {circuit.logit_diff:.2f}"
    return NOT_SEEN, f"{evidence}, {of_all}, which does not turn the answer around."


def _overlaps(results: CircuitsResults, thirds: tuple[str, ...]) -> tuple[list[float], list[float]] | None:
    """Return the shared parts of the features that return in some thirds of the layers, of their union.

    Returns:
      Those of pairs of languages, and of a language with every unrelated behaviour; None where there is no such pair.
    """
    features = {
        name: {key.address for key in circuit.returning if third_of(key.layer, circuit.layers) in thirds}
        for name, circuit in results.behaviours.items()
    }
    languages = [name for name in _LANGUAGES if name in features]
    others = [name for name in features if name not in _LANGUAGES]
    pairs = itertools.combinations(languages, 2), itertools.product(languages, others)
    related, unrelated = (
        [len(features[a] & features[b]) / max(len(features[a] | features[b]), 1) for a, b in some] for some in pairs
    )
    return (related, unrelated) if related and unrelated else None


def _shared(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    overlaps = _overlaps(results, THIRDS)
    if overlaps is None:
        return NOT_TESTABLE, _NO_PAIRS
    related, unrelated = overlaps
    # The least similar languages must share more than any unrelated pair: of so few pairs there is no test.
    outcome = CONFIRMED if min(related) > max(unrelated) else NOT_SEEN
    return outcome, (
        f"Languages share {percent(min(related))} to {percent(max(related))} of the features that return, a language "
        f"and an unrelated behaviour {percent(min(unrelated))} to {percent(max(unrelated))}."
    )


def _shared_middle(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    beyond = {}
    for third in THIRDS:
        overlaps = _overlaps(results, (third,))
        if overlaps is None:
            return NOT_TESTABLE, _NO_PAIRS
        related, unrelated = overlaps
        # Less what unrelated behaviours share there: late layers share features of any text.
        beyond[third] = sum(related) / len(related) - sum(unrelated) / len(unrelated)
    outcome = CONFIRMED if beyond["middle"] > max(beyond["early"], beyond["late"], 0.0) else NOT_SEEN
    shares = ", ".join(f"{third} {percent(value)}" for third, value in beyond.items())
    return outcome, f"Shared by languages beyond what unrelated behaviours share, by third of the layers: {shares}."


TESTS: Mapping[str, Callable[[CircuitsResults, CircuitResults], tuple[str, str]]] = dict(
    through=_through,
    through_entity=_through_entity,
    meeting=_meeting,
    direct=_direct,
    swap=_swap,
    shared=_shared,
    shared_middle=_shared_middle,
)

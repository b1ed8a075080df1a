"""Published claims about circuits, beside what was measured here.

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
from saejax.circuits.groups import THIRDS, parse_key, third_of
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.page.tables import interval, number, percent
from saejax.page.words import behaviour as title

CONFIRMED, NOT_SEEN, NOT_TESTABLE = "confirmed", "not seen", "not testable"
_LANGUAGES = ("antonym", "antonym_french", "antonym_spanish")
_NO_PAIRS = "It takes two languages and an unrelated behaviour that the model has."


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published claim."""

    id: str  #: its name
    behaviour: str  #: that it is about; "": none of ours
    test: str  #: name of its test in ``TESTS``; "": there is none
    source: str  #: where it was published
    claim: str  #: in our words
    note: str = ""  #: what is not tested, or why nothing is


@dataclasses.dataclass(frozen=True)
class JudgedClaim:
    """A claim, what came out here, and the evidence in a sentence."""

    claim: Claim
    outcome: str
    evidence: str


def read_claims() -> list[Claim]:
    """Return the claims of ``data/claims.json``."""
    text = (importlib.resources.files(__package__) / "data" / "claims.json").read_text("utf-8")
    return [Claim(**fields) for fields in json.loads(text)]


def compare_claims(results: CircuitsResults) -> list[JudgedClaim]:
    """Return every claim beside what was measured."""
    return [_compare(claim, results) for claim in read_claims()]


def _compare(claim: Claim, results: CircuitsResults) -> JudgedClaim:
    if not claim.test:
        return JudgedClaim(claim, NOT_TESTABLE, claim.note)
    if claim.behaviour not in results.behaviours:
        why = results.left_out.get(claim.behaviour, "the behaviour was not studied in this run")
        return JudgedClaim(claim, NOT_TESTABLE, f"{title(claim.behaviour)}: {why}.")
    outcome, evidence = TESTS[claim.test](results, results.behaviours[claim.behaviour])
    return JudgedClaim(claim, outcome, " ".join(filter(None, (evidence, claim.note))))


def _has_role(circuit: CircuitResults, name: str, role: str) -> bool:
    """Return whether most features of a group stand at positions of a role."""
    (group,) = (group for group in circuit.groups if group.name == name)
    return sum(member.endswith(f"_{role}") for member in group.members) * 2 > len(group.members)


def _say(*edges: Edge) -> str:
    """Return edges with their effects and controls in words."""
    parts = []
    for edge in edges:
        target, scale, digits, unit = edge.target, 100.0, 0, "% of its activation"
        if edge.target == ANSWER:
            target, scale, digits, unit = "the answer", 1.0, 2, "logits"
        random, placebo = (number(value, digits, scale) for value in (edge.random, edge.placebo))
        effect = interval(edge.effect, digits, scale)
        parts.append(f"{edge.source} to {target}: {effect} {unit} (random {random}, placebo {placebo})")
    return "; ".join(parts)


def _steps(circuit: CircuitResults, role: str) -> dict[str, tuple[Edge, Edge]]:
    """Return the groups on a drawn path from a group of a role to the answer, each with both edges."""
    drawn = circuit.drawn()
    into = {edge.source: edge for edge in drawn if edge.target == ANSWER}
    # As often as there are groups: no path is longer.
    for _ in circuit.groups:  # what reaches the answer through others, too
        for edge in drawn:
            if edge.target in into and edge.source not in into:
                into[edge.source] = edge
    return {
        edge.target: (edge, into[edge.target])
        for edge in drawn
        if edge.target in into and _has_role(circuit, edge.source, role)
    }


def _through(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    for edges in _steps(circuit, "content").values():
        return CONFIRMED, f"{_say(*edges)}."
    return NOT_SEEN, "No drawn path leads from what differs between prompts through another group to the answer."


def _through_entity(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    """Judge a step before the answer: a group that carries which answer it is, and is none of those that say it."""
    carrying = {edge.source for edge in circuit.drawn("swap")}
    layer_of = {group.name: group.layer for group in circuit.groups}
    for name, edges in _steps(circuit, "content").items():
        # Such a group says the answer; the claim is about a step before it.
        says = _has_role(circuit, name, "last") and third_of(int(layer_of[name]), circuit.layers) == THIRDS[-1]
        if name in carrying and not says:
            return CONFIRMED, f"{_say(*edges)}; exchanged with the counterpart's, it moves the answer."
    return NOT_SEEN, "No group before those that say the answer is on a drawn path to it and carries which one it is."


def _meeting(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    content, context = _steps(circuit, "content"), _steps(circuit, "context")
    for name in content.keys() & context.keys():
        return CONFIRMED, f"{_say(content[name][0], context[name][0], content[name][1])}."
    return NOT_SEEN, "No group on a drawn path to the answer is fed by both the content and the words around it."


def _direct(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    for edge in circuit.drawn():
        if edge.target == ANSWER and _has_role(circuit, edge.source, "content"):
            return CONFIRMED, f"{_say(edge)} while all other groups were held."
    return NOT_SEEN, "No group at the content acts on the answer while the other groups are held."


def _swap(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    if not circuit.swapped:
        return NOT_TESTABLE, "Prompts and counterparts differ in length, so nothing was exchanged."
    best = max(circuit.drawn("swap"), key=lambda edge: edge.effect.mean, default=None)
    if best is None:
        return NOT_SEEN, "No group moves the answer to the counterpart's when its activations are exchanged."
    evidence = f"Exchanged with the counterpart's activations, {_say(best)}"
    if best.effect.mean > circuit.logit_diff:
        return CONFIRMED, f"{evidence}, which turns the mean answer around."
    of_all = f"of a mean logit difference of {circuit.logit_diff:.2f}"
    return NOT_SEEN, f"{evidence}, {of_all}, which does not turn the answer around."


def _overlaps(results: CircuitsResults, third: str = "") -> tuple[list[float], list[float]]:
    """Return the shared parts of the features that return, of their union, of pairs of behaviours.

    Args:
      results: of all behaviours.
      third: of the layers; "": all.

    Returns:
      Those of two languages, and of a language with every unrelated behaviour.
    """
    features = {}
    for name, circuit in results.behaviours.items():
        keys = {parse_key(key)[:2] for key in circuit.returning}
        features[name] = {key for key in keys if third in ("", third_of(key[0], circuit.layers))}
    languages = [name for name in _LANGUAGES if name in features]
    unrelated_names = [name for name in features if name not in _LANGUAGES]
    related, unrelated = (
        [len(features[a] & features[b]) / max(len(features[a] | features[b]), 1) for a, b in pairs]
        for pairs in (itertools.combinations(languages, 2), itertools.product(languages, unrelated_names))
    )
    return related, unrelated


def _shared(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    related, unrelated = _overlaps(results)
    if not related or not unrelated:
        return NOT_TESTABLE, _NO_PAIRS
    # The least similar languages must share more than any unrelated pair: of so few pairs there is no test.
    outcome = CONFIRMED if min(related) > max(unrelated) else NOT_SEEN
    return outcome, (
        f"Languages share {percent(min(related))} to {percent(max(related))} of the features that return, a language "
        f"and an unrelated behaviour {percent(min(unrelated))} to {percent(max(unrelated))}."
    )


def _shared_middle(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    beyond = {}
    for third in THIRDS:
        related, unrelated = _overlaps(results, third)
        if not related or not unrelated:
            return NOT_TESTABLE, _NO_PAIRS
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

"""Published claims about circuits: what came of each here, and the evidence in a sentence.

A claim is *confirmed* if the edges that it predicts are drawn, which takes an interval and two controls
(``edges.judge_edges``), or if features are shared beyond what unrelated behaviours share. It is *not seen* if they were
measured and are not drawn, and *not testable* where the model does not have the behaviour, nothing was measured, there
is no test, or the claim would hold if the effects that could not be tested were drawn.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from saejax.circuits.edges import Edge
from saejax.circuits.groups import ANSWER, THIRDS, is_output, third_of
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.files import read_json
from saejax.page.tables import interval, number, percent
from saejax.page.words import behaviour as title

DATA = Path(__file__).parent / "data"
CONFIRMED, NOT_SEEN, NOT_TESTABLE = "confirmed", "not seen", "not testable"
_LANGUAGES = ("antonym", "antonym_french", "antonym_spanish")
_NO_PAIRS = NOT_TESTABLE, "It takes two languages and an unrelated behaviour that the model has."


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published claim, as ``data/claims.json`` has it."""

    id: str  #: its name
    behaviour: str  #: that it is about; "": none of ours
    test: str  #: name of its test in ``TESTS``; "": there is none
    source: str  #: where it was published
    claim: str  #: in our words
    note: str = ""  #: what is not tested, or why nothing is


@dataclasses.dataclass(frozen=True)
class ComparedClaim:
    """A published claim, and what came of it here."""

    claim: Claim
    outcome: str  #: confirmed, not seen or not testable
    evidence: str  #: for the outcome, in a sentence


def read_claims() -> list[Claim]:
    """Return the claims of ``data/claims.json``."""
    return [Claim(**fields) for fields in read_json(DATA / "claims.json")]


def compare_claims(results: CircuitsResults) -> list[ComparedClaim]:
    """Return every claim with what was measured."""
    compared = []
    for claim in read_claims():
        circuit, outcome = results.behaviours.get(claim.behaviour), NOT_TESTABLE
        if not claim.test:
            evidence = claim.note
        elif not circuit:
            why = results.left_out.get(claim.behaviour, "the behaviour was not studied in this run")
            evidence = f"{title(claim.behaviour)}: {why}."
        elif not circuit.groups:
            evidence = f"{title(claim.behaviour)}: no feature returned over the traced prompts: nothing was measured."
        else:
            outcome, evidence = TESTS[claim.test](results, circuit)
            untested = [edge for edge in circuit.edges if not edge.is_testable]
            if outcome == NOT_SEEN and TESTS[claim.test](results, _draw(circuit, untested))[0] == CONFIRMED:
                outcome = NOT_TESTABLE
                evidence += (
                    f" Of {len(circuit.edges)} effects {len(untested)} could not be tested, for want of prompts or of "
                    "controls of equal dose; with them it might be confirmed."
                )
            evidence = f"{evidence} {claim.note}".strip()
        compared.append(ComparedClaim(claim, outcome, evidence))
    return compared


def _draw(circuit: CircuitResults, edges: Sequence[Edge]) -> CircuitResults:
    """Return the circuit with some more edges drawn."""
    drawn = [dataclasses.replace(edge, drawn=True) if edge in edges else edge for edge in circuit.edges]
    return dataclasses.replace(circuit, edges=tuple(drawn))


def _supporting(circuit: CircuitResults, edit: str = "direct") -> list[Edge]:
    """Return the drawn edges of an edit that support what they act on: none of the claims is about inhibition."""
    return [edge for edge in circuit.drawn(edit) if edge.effect.mean > 0]


def _judge_edges(edges: Sequence[Edge], lacks: str) -> tuple[str, str]:
    """Return that the claim is confirmed by some edges, or else what is lacking."""
    return (CONFIRMED, _list_edges(edges)) if edges else (NOT_SEEN, lacks)


def _list_edges(edges: Sequence[Edge]) -> str:
    """Return edges with their effects and controls, as a sentence."""
    words = (
        f"{edge.source}{', exchanged,' if edge.edit == 'swap' else ''} to "
        f"{'the answer' if edge.target == ANSWER else edge.target}: {edge.in_unit(interval, edge.effect)} "
        f"(random {edge.in_unit(number, edge.random)}, placebo {edge.in_unit(number, edge.placebo)})"
        for edge in edges
    )
    return f"{'; '.join(words)}."


def _step(circuit: CircuitResults, roles: set[str], carries: bool = False) -> list[Edge]:
    """Return a drawn path to the answer through a group on which groups of all these roles act; [] if there is none.

    With ``carries`` the group must also carry which answer it is, and be none of those that say it.
    """
    drawn, role_of = _supporting(circuit), {group.name: group.role for group in circuit.groups}
    onward = {edge.source: edge for edge in drawn if edge.target == ANSWER}
    # What reaches the answer through others, too: as often as there are groups, since no path is longer.
    for _ in circuit.groups:
        onward = {edge.source: edge for edge in drawn if edge.target in onward} | onward
    exchanged = {edge.source: edge for edge in _supporting(circuit, "swap")}
    for group in circuit.groups:
        acting = {role_of[edge.source]: edge for edge in drawn if edge.target == group.name}
        if group.name in onward and acting.keys() >= roles:
            path = [*(acting[role] for role in sorted(roles)), onward[group.name]]
            if not carries:
                return path
            if group.name in exchanged and not is_output(group, circuit.layers):
                return [*path, exchanged[group.name]]
    return []


def _judge_direct(circuit: CircuitResults) -> tuple[str, str]:
    content = [group.name for group in circuit.groups if group.role == "content"]
    edges = [edge for edge in _supporting(circuit) if edge.target == ANSWER and edge.source in content]
    return _judge_edges(edges, "No group at the content acts on the answer while the other groups are held.")


def _judge_swap(circuit: CircuitResults) -> tuple[str, str]:
    if not circuit.swapped or circuit.swapped_logit_diff is None:
        return NOT_TESTABLE, "Nothing was exchanged: prompts and counterparts differ in length."
    best = sorted(_supporting(circuit, "swap"), key=lambda edge: -edge.effect.mean)[:1]
    if not best:
        return NOT_SEEN, "No group moves the answer to the counterpart's when it takes its activations."
    # The logit difference of the same prompts: others differ from their counterparts in length, and in difficulty.
    if best[0].effect.mean > circuit.swapped_logit_diff:
        return CONFIRMED, _list_edges(best)
    mean = f"{circuit.swapped_logit_diff:.2f}"
    return NOT_SEEN, f"{_list_edges(best)} It does not turn these prompts' mean logit difference of {mean} around."


def _overlaps(results: CircuitsResults, *thirds: str) -> tuple[list[float], list[float]]:
    """Return the shared parts, of their union, of the features that return in some thirds of the layers.

    Returns:
      Those of pairs of languages, and of a language with every unrelated behaviour.
    """
    features = {
        name: {key.address for key in circuit.returning if third_of(key.layer, circuit.layers) in thirds}
        for name, circuit in results.behaviours.items()
        if circuit.returning
    }
    languages, others = [name for name in _LANGUAGES if name in features], features.keys() - {*_LANGUAGES}
    pairs = itertools.combinations(languages, 2), itertools.product(languages, sorted(others))
    # Two behaviours of which nothing returned there share nothing, and differ in nothing.
    related, unrelated = (
        [len(features[a] & features[b]) / len(features[a] | features[b]) for a, b in some if features[a] | features[b]]
        for some in pairs
    )
    return related, unrelated


def _judge_shared(results: CircuitsResults) -> tuple[str, str]:
    related, unrelated = _overlaps(results, *THIRDS)
    if not related or not unrelated:
        return _NO_PAIRS
    shares = [f"{percent(min(some))} to {percent(max(some))}" for some in (related, unrelated)]
    evidence = (
        f"Languages share {shares[0]} of the features that return, a language and an unrelated behaviour {shares[1]}."
    )
    # The least similar languages must share more than any unrelated pair: of so few pairs there is no test.
    return (CONFIRMED if min(related) > max(unrelated) else NOT_SEEN), evidence


def _judge_shared_middle(results: CircuitsResults) -> tuple[str, str]:
    overlaps = {third: _overlaps(results, third) for third in THIRDS}
    if not all(map(all, overlaps.values())):
        return _NO_PAIRS
    # Less what unrelated behaviours share there: late layers share features of any text.
    beyond = {third: fmean(related) - fmean(unrelated) for third, (related, unrelated) in overlaps.items()}
    shares = ", ".join(f"{third} {percent(value)}" for third, value in beyond.items())
    evidence = f"Shared by languages beyond what unrelated behaviours share, by third of the layers: {shares}."
    return (CONFIRMED if beyond["middle"] > max(beyond["early"], beyond["late"], 0.0) else NOT_SEEN), evidence


#: The tests of claims: a run's circuits, and that of the claim's behaviour, to the outcome and its evidence.
TESTS: Mapping[str, Callable[[CircuitsResults, CircuitResults], tuple[str, str]]] = dict(
    through=lambda _, circuit: _judge_edges(
        _step(circuit, {"content"}),
        "No drawn path leads from what differs between prompts through another group to the answer.",
    ),
    through_entity=lambda _, circuit: _judge_edges(
        _step(circuit, {"content"}, carries=True),
        "No group before those that say the answer is on a drawn path to it and carries which one it is.",
    ),
    meeting=lambda _, circuit: _judge_edges(
        _step(circuit, {"content", "context"}),
        "On no group on a drawn path to the answer act both the content and the words around it.",
    ),
    direct=lambda _, circuit: _judge_direct(circuit),
    swap=lambda _, circuit: _judge_swap(circuit),
    shared=lambda results, _: _judge_shared(results),
    shared_middle=lambda results, _: _judge_shared_middle(results),
)

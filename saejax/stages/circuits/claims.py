"""Published claims about circuits: what came of each here, and the evidence in a sentence.

A claim is *confirmed* if the edges that it predicts are drawn, which takes an interval and two controls
(``edges.judge_edges``), or if features are shared beyond what unrelated behaviours share. It is *not seen* if they were
measured and are not drawn, and *not testable* where the model does not have the behaviour, nothing was measured, there
is no test, or the claim would hold if the effects that could not be tested were drawn.
"""

import dataclasses
import itertools
from collections.abc import Sequence
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


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published claim, as ``data/claims.json`` has it, and what came of it here."""

    id: str  #: its name
    behaviour: str  #: that it is about; "": none of ours
    test: str  #: name of its test in ``TESTS``; "": there is none
    source: str  #: where it was published
    claim: str  #: in our words
    note: str = ""  #: what is not tested, or why nothing is
    acting: Sequence[str] = ()  #: of ``path``: roles of the groups that act on the step to the answer
    carries: bool = False  #: of ``path``: whether the step says which answer it is, before those that say the answer
    lacks: str = ""  #: what is said where no edges confirm it
    outcome: str = NOT_TESTABLE  #: confirmed, not seen or not testable
    evidence: str = ""  #: for the outcome, in a sentence


def compare_claims(results: CircuitsResults) -> list[Claim]:
    """Return every claim with what was measured."""
    claims = [Claim(**fields) for fields in read_json(DATA / "claims.json")]
    outcomes = [_compare(claim, results) for claim in claims]
    return [dataclasses.replace(c, outcome=o, evidence=e) for c, (o, e) in zip(claims, outcomes, strict=True)]


def _compare(claim: Claim, results: CircuitsResults) -> tuple[str, str]:
    """Return the outcome of a claim and the evidence."""
    circuit, name = results.behaviours.get(claim.behaviour), title(claim.behaviour)
    if not claim.test:
        return NOT_TESTABLE, claim.note
    if not circuit:
        why = results.left_out.get(claim.behaviour, "the behaviour was not studied in this run")
        return NOT_TESTABLE, f"{name}: {why}."
    if not circuit.groups:
        return NOT_TESTABLE, f"{name}: no feature returned over the traced prompts: nothing was measured."
    outcome, evidence = TESTS[claim.test](claim, results, circuit)
    untested = sum(not edge.is_testable for edge in circuit.edges)
    drawn = [dataclasses.replace(edge, drawn=edge.drawn or not edge.is_testable) for edge in circuit.edges]
    at_best = dataclasses.replace(circuit, edges=tuple(drawn))
    if outcome == NOT_SEEN and TESTS[claim.test](claim, results, at_best)[0] == CONFIRMED:
        outcome = NOT_TESTABLE
        evidence += (
            f" Of {len(circuit.edges)} effects {untested} could not be tested, for want of prompts or of controls of "
            "equal dose; with them it might be confirmed."
        )
    return outcome, f"{evidence} {claim.note}".strip()


def _supporting(circuit: CircuitResults, edit: str = "direct") -> list[Edge]:
    """Return the drawn edges of an edit that support what they act on: none of the claims is about inhibition."""
    return [edge for edge in circuit.drawn(edit) if edge.effect.mean > 0]


def _list_edges(edges: Sequence[Edge]) -> str:
    """Return edges with their effects and controls, as a sentence."""
    words = (
        f"{edge.source}{', exchanged,' if edge.edit == 'swap' else ''} to "
        f"{'the answer' if edge.target == ANSWER else edge.target}: {edge.in_unit(interval, edge.effect)} "
        f"(random {edge.in_unit(number, edge.random)}, placebo {edge.in_unit(number, edge.placebo)})"
        for edge in edges
    )
    return f"{'; '.join(words)}."


def _judge_path(claim: Claim, results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    """Look for a drawn path to the answer through a group on which groups of all the claim's roles act."""
    drawn, role_of = _supporting(circuit), {group.name: group.role for group in circuit.groups}
    onward = {edge.source: edge for edge in drawn if edge.target == ANSWER}
    # What reaches the answer through others, too: as often as there are groups, since no path is longer.
    for _ in circuit.groups:
        onward = {edge.source: edge for edge in drawn if edge.target in onward} | onward
    exchanged = {edge.source: edge for edge in _supporting(circuit, "swap")}
    for group in circuit.groups:
        acting = {role_of[edge.source]: edge for edge in drawn if edge.target == group.name}
        if group.name in onward and acting.keys() >= {*claim.acting}:
            path = [*(acting[role] for role in claim.acting), onward[group.name]]
            if not claim.carries:
                return CONFIRMED, _list_edges(path)
            if group.name in exchanged and not is_output(group, circuit.layers):
                return CONFIRMED, _list_edges([*path, exchanged[group.name]])
    return NOT_SEEN, claim.lacks


def _judge_direct(claim: Claim, results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    content = [group.name for group in circuit.groups if group.role == "content"]
    edges = [edge for edge in _supporting(circuit) if edge.target == ANSWER and edge.source in content]
    return (CONFIRMED, _list_edges(edges)) if edges else (NOT_SEEN, claim.lacks)


def _judge_swap(claim: Claim, results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
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


def _judge_shared(claim: Claim, results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    related, unrelated = _overlaps(results, *THIRDS)
    if not related or not unrelated:
        return NOT_TESTABLE, claim.lacks
    shares = [f"{percent(min(some))} to {percent(max(some))}" for some in (related, unrelated)]
    evidence = (
        f"Languages share {shares[0]} of the features that return, a language and an unrelated behaviour {shares[1]}."
    )
    # The least similar languages must share more than any unrelated pair: of so few pairs there is no test.
    return (CONFIRMED if min(related) > max(unrelated) else NOT_SEEN), evidence


def _judge_shared_middle(claim: Claim, results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    overlaps = {third: _overlaps(results, third) for third in THIRDS}
    if not all(map(all, overlaps.values())):
        return NOT_TESTABLE, claim.lacks
    # Less what unrelated behaviours share there: late layers share features of any text.
    beyond = {third: fmean(related) - fmean(unrelated) for third, (related, unrelated) in overlaps.items()}
    shares = ", ".join(f"{third} {percent(value)}" for third, value in beyond.items())
    evidence = f"Shared by languages beyond what unrelated behaviours share, by third of the layers: {shares}."
    return (CONFIRMED if beyond["middle"] > max(beyond["early"], beyond["late"], 0.0) else NOT_SEEN), evidence


#: The tests: a claim, a run's circuits, and that of the claim's behaviour, to the outcome and its evidence.
TESTS = dict(
    path=_judge_path,
    direct=_judge_direct,
    swap=_judge_swap,
    shared=_judge_shared,
    shared_middle=_judge_shared_middle,
)

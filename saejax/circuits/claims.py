"""Published claims about circuits, and what was measured of them here.

A claim is *confirmed* if the edges that it predicts are drawn, which takes an interval and two controls
(``edges.judge_edges``), or if features are shared beyond what unrelated behaviours share. It is *not seen* if they were
measured and are not drawn, and *not testable* where the model does not have the behaviour, nothing was measured, or
this study has no test.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
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
    return [Claim(**fields) for fields in read_json(DATA / "claims.json")]


def compare_claims(results: CircuitsResults) -> list[Claim]:
    """Return every claim with what was measured."""
    compared = []
    for claim in read_claims():
        outcome, evidence = NOT_TESTABLE, claim.note
        circuit = results.behaviours.get(claim.behaviour)
        if claim.test and circuit and not circuit.groups:
            evidence = f"{title(claim.behaviour)}: no feature returned over the traced prompts: nothing was measured."
        elif claim.test and circuit:
            outcome, evidence = TESTS[claim.test](results, circuit)
            evidence = f"{evidence} {claim.note}".strip()
        elif claim.test:
            why = results.left_out.get(claim.behaviour, "the behaviour was not studied in this run")
            evidence = f"{title(claim.behaviour)}: {why}."
        compared.append(dataclasses.replace(claim, outcome=outcome, evidence=evidence))
    return compared


def _supporting(circuit: CircuitResults, edit: str = "direct") -> list[Edge]:
    """Return the drawn edges of an edit that support what they act on: none of the claims is about inhibition."""
    return [edge for edge in circuit.drawn(edit) if edge.effect.mean > 0]


def _judge(edges: Sequence[Edge], missing: str) -> tuple[str, str]:
    """Return the outcome and the evidence of a claim: confirmed by the drawn edges that it predicts, else not seen.

    Args:
      edges: the edges.
      missing: what is not drawn if there are none, a sentence.
    """
    if not edges:
        return NOT_SEEN, missing
    words = (
        f"{edge.source}{', exchanged,' if edge.edit == 'swap' else ''} to "
        f"{'the answer' if edge.target == ANSWER else edge.target}: {edge.in_unit(interval, edge.effect)} "
        f"(random {edge.in_unit(number, edge.random)}, placebo {edge.in_unit(number, edge.placebo)})"
        for edge in edges
    )
    return CONFIRMED, f"{'; '.join(words)}."


def _step(
    roles: Collection[str], carries: bool, missing: str, results: CircuitsResults, circuit: CircuitResults
) -> tuple[str, str]:
    """Judge a step before the answer: a group on a drawn path to it, on which groups of all these roles act.

    Args:
      roles: of the groups that act on it.
      carries: whether the group must also carry which answer it is, and be none of those that say it.
      missing: as for ``_judge``.
      results: of all behaviours.
      circuit: of the claim's behaviour.
    """
    drawn, role_of = _supporting(circuit), {group.name: group.role for group in circuit.groups}
    onward = {edge.source: edge for edge in drawn if edge.target == ANSWER}
    # What reaches the answer through others, too: as often as there are groups, since no path is longer.
    for _ in circuit.groups:
        onward = {edge.source: edge for edge in drawn if edge.target in onward} | onward
    exchanged = {edge.source: edge for edge in _supporting(circuit, "swap")}
    for group in circuit.groups:
        acting = {role_of[edge.source]: edge for edge in drawn if edge.target == group.name}
        if group.name in onward and acting.keys() >= set(roles):
            path = [*(acting[role] for role in roles), onward[group.name]]
            if not carries:
                return _judge(path, missing)
            if group.name in exchanged and not is_output(group, circuit.layers):
                return _judge([*path, exchanged[group.name]], missing)
    return _judge([], missing)


def _direct(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    content = [group.name for group in circuit.groups if group.role == "content"]
    edges = [edge for edge in _supporting(circuit) if edge.target == ANSWER and edge.source in content]
    return _judge(edges, "No group at the content acts on the answer while the other groups are held.")


def _swap(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    if not circuit.swapped:
        return NOT_TESTABLE, "Nothing was exchanged: prompts and counterparts differ in length."
    best = sorted(_supporting(circuit, "swap"), key=lambda edge: -edge.effect.mean)[:1]
    outcome, evidence = _judge(best, "No group moves the answer to the counterpart's when it takes its activations.")
    if best and best[0].effect.mean <= circuit.logit_diff:
        return NOT_SEEN, f"{evidence} It does not turn the mean logit difference of {circuit.logit_diff:.2f} around."
    return outcome, evidence


def _overlaps(results: CircuitsResults, *thirds: str) -> tuple[list[float], list[float]]:
    """Return the shared parts of the features that return in some thirds of the layers, of their union.

    Returns:
      Those of pairs of languages, and of a language with every unrelated behaviour.
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
    return related, unrelated


def _shared(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    related, unrelated = _overlaps(results, *THIRDS)
    if not related or not unrelated:
        return NOT_TESTABLE, _NO_PAIRS
    # The least similar languages must share more than any unrelated pair: of so few pairs there is no test.
    outcome = CONFIRMED if min(related) > max(unrelated) else NOT_SEEN
    return outcome, (
        f"Languages share {percent(min(related))} to {percent(max(related))} of the features that return, a language "
        f"and an unrelated behaviour {percent(min(unrelated))} to {percent(max(unrelated))}."
    )


def _shared_middle(results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    overlaps = {third: _overlaps(results, third) for third in THIRDS}
    if not all(map(all, overlaps.values())):
        return NOT_TESTABLE, _NO_PAIRS
    # Less what unrelated behaviours share there: late layers share features of any text.
    beyond = {third: fmean(related) - fmean(unrelated) for third, (related, unrelated) in overlaps.items()}
    outcome = CONFIRMED if beyond["middle"] > max(beyond["early"], beyond["late"], 0.0) else NOT_SEEN
    shares = ", ".join(f"{third} {percent(value)}" for third, value in beyond.items())
    return outcome, f"Shared by languages beyond what unrelated behaviours share, by third of the layers: {shares}."


TESTS: Mapping[str, Callable[[CircuitsResults, CircuitResults], tuple[str, str]]] = dict(
    through=functools.partial(
        _step,
        ("content",),
        False,
        "No drawn path leads from what differs between prompts through another group to the answer.",
    ),
    through_entity=functools.partial(
        _step,
        ("content",),
        True,
        "No group before those that say the answer is on a drawn path to it and carries which one it is.",
    ),
    meeting=functools.partial(
        _step,
        ("content", "context"),
        False,
        "On no group on a drawn path to the answer act both the content and the words around it.",
    ),
    direct=_direct,
    swap=_swap,
    shared=_shared,
    shared_middle=_shared_middle,
)

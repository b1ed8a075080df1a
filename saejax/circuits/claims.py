"""Published claims about circuits, and what was measured of them here.

A claim is *confirmed* if the edges that it predicts are drawn, which takes an interval and two controls
(``edges.judge_edges``), or if features are shared beyond what unrelated behaviours share. It is *not seen* if they were
measured and are not drawn, and *not testable* where the model does not have the behaviour, nothing was measured, or
this study has no test.
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

DATA = Path(__file__).parent / "data"
CONFIRMED, NOT_SEEN, NOT_TESTABLE = "confirmed", "not seen", "not testable"
_LANGUAGES = ("antonym", "antonym_french", "antonym_spanish")


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
class JudgedClaim:
    """The outcome of a claim here, and the measurements that decide it."""

    outcome: str  #: confirmed, not seen or not testable
    edges: Sequence[Edge] = ()  #: the drawn edges that the claim predicts; (): there are none
    related: Sequence[float] = ()  #: shares of the features that return which two languages have in common
    unrelated: Sequence[float] = ()  #: the same of a language and an unrelated behaviour
    #: by third of the layers, what languages share on average beyond what unrelated behaviours do.
    beyond: Mapping[str, float] = dataclasses.field(default_factory=dict)


def read_claims() -> list[Claim]:
    """Return the claims of ``data/claims.json``."""
    return [Claim(**fields) for fields in read_json(DATA / "claims.json")]


def judge_claim(claim: Claim, results: CircuitsResults) -> JudgedClaim:
    """Return what was measured of a claim; it is not testable without a test or a circuit with groups."""
    circuit = results.behaviours.get(claim.behaviour)
    if not claim.test or not circuit or not circuit.groups:
        return JudgedClaim(NOT_TESTABLE)
    judged = TESTS[claim.test](results, circuit)
    # Of edges the outcome is whether there are any.
    return judged if isinstance(judged, JudgedClaim) else JudgedClaim(CONFIRMED if judged else NOT_SEEN, judged)


def _supporting(circuit: CircuitResults, edit: str = "direct") -> list[Edge]:
    """Return the drawn edges of an edit that support what they act on: none of the claims is about inhibition."""
    return [edge for edge in circuit.drawn(edit) if edge.effect.mean > 0]


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


def _direct(circuit: CircuitResults) -> list[Edge]:
    content = [group.name for group in circuit.groups if group.role == "content"]
    return [edge for edge in _supporting(circuit) if edge.target == ANSWER and edge.source in content]


def _swap(circuit: CircuitResults) -> JudgedClaim:
    if not circuit.swapped or circuit.swapped_logit_diff is None:
        return JudgedClaim(NOT_TESTABLE)
    best = sorted(_supporting(circuit, "swap"), key=lambda edge: -edge.effect.mean)[:1]
    # The logit difference of the same prompts: others differ from their counterparts in length, and in difficulty.
    turns = best and best[0].effect.mean > circuit.swapped_logit_diff
    return JudgedClaim(CONFIRMED if turns else NOT_SEEN, best)


def _overlaps(results: CircuitsResults, *thirds: str) -> tuple[list[float], list[float]]:
    """Return the shared parts, of their union, of the features that return in some thirds of the layers.

    Returns:
      Those of pairs of languages, and of a language with every unrelated behaviour.
    """
    features = {
        name: {key.address for key in circuit.returning if third_of(key.layer, circuit.layers) in thirds}
        for name, circuit in results.behaviours.items()
    }
    languages, others = [name for name in _LANGUAGES if name in features], features.keys() - {*_LANGUAGES}
    pairs = itertools.combinations(languages, 2), itertools.product(languages, sorted(others))
    related, unrelated = (
        [len(features[a] & features[b]) / max(len(features[a] | features[b]), 1) for a, b in some] for some in pairs
    )
    return related, unrelated


def _shared(results: CircuitsResults) -> JudgedClaim:
    related, unrelated = _overlaps(results, *THIRDS)
    if not related or not unrelated:
        return JudgedClaim(NOT_TESTABLE)
    # The least similar languages must share more than any unrelated pair: of so few pairs there is no test.
    return JudgedClaim(CONFIRMED if min(related) > max(unrelated) else NOT_SEEN, (), related, unrelated)


def _shared_middle(results: CircuitsResults) -> JudgedClaim:
    overlaps = {third: _overlaps(results, third) for third in THIRDS}
    if not all(map(all, overlaps.values())):
        return JudgedClaim(NOT_TESTABLE)
    # Less what unrelated behaviours share there: late layers share features of any text.
    beyond = {third: fmean(related) - fmean(unrelated) for third, (related, unrelated) in overlaps.items()}
    outcome = CONFIRMED if beyond["middle"] > max(beyond["early"], beyond["late"], 0.0) else NOT_SEEN
    return JudgedClaim(outcome, beyond=beyond)


TESTS: Mapping[str, Callable[[CircuitsResults, CircuitResults], JudgedClaim | list[Edge]]] = dict(
    through=lambda _, circuit: _step(circuit, {"content"}),
    through_entity=lambda _, circuit: _step(circuit, {"content"}, carries=True),
    meeting=lambda _, circuit: _step(circuit, {"content", "context"}),
    direct=lambda _, circuit: _direct(circuit),
    swap=lambda _, circuit: _swap(circuit),
    shared=lambda results, _: _shared(results),
    shared_middle=lambda results, _: _shared_middle(results),
)

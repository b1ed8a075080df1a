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

DATA = Path(__file__).parent / "data"
CONFIRMED, NOT_SEEN, NOT_TESTABLE = "confirmed", "not seen", "not testable"
_LANGUAGES = ("antonym", "antonym_french", "antonym_spanish")


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
    """The outcome of a claim here, and the measurements that decide it."""

    outcome: str  #: confirmed, not seen or not testable
    edges: tuple[Edge, ...] = ()  #: the drawn edges that the claim predicts; (): there are none
    related: tuple[float, ...] = ()  #: shares of the features that return which two languages have in common
    unrelated: tuple[float, ...] = ()  #: the same of a language and an unrelated behaviour
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
    return TESTS[claim.test](results, circuit)


def _supporting(circuit: CircuitResults, edit: str = "direct") -> list[Edge]:
    """Return the drawn edges of an edit that support what they act on: none of the claims is about inhibition."""
    return [edge for edge in circuit.drawn(edit) if edge.effect.mean > 0]


def _judge(edges: Sequence[Edge]) -> JudgedClaim:
    """Judge a claim by the drawn edges that it predicts: confirmed, or not seen if there are none."""
    return JudgedClaim(CONFIRMED if edges else NOT_SEEN, tuple(edges))


def _step(roles: Collection[str], carries: bool, results: CircuitsResults, circuit: CircuitResults) -> JudgedClaim:
    """Judge a step before the answer: a group on a drawn path to it, on which groups of all these roles act.

    Args:
      roles: of the groups that act on it.
      carries: whether the group must also carry which answer it is, and be none of those that say it.
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
                return _judge(path)
            if group.name in exchanged and not is_output(group, circuit.layers):
                return _judge([*path, exchanged[group.name]])
    return _judge([])


def _direct(results: CircuitsResults, circuit: CircuitResults) -> JudgedClaim:
    content = [group.name for group in circuit.groups if group.role == "content"]
    edges = [edge for edge in _supporting(circuit) if edge.target == ANSWER and edge.source in content]
    return _judge(edges)


def _swap(results: CircuitsResults, circuit: CircuitResults) -> JudgedClaim:
    if not circuit.swapped or circuit.swapped_logit_diff is None:
        return JudgedClaim(NOT_TESTABLE)
    best = sorted(_supporting(circuit, "swap"), key=lambda edge: -edge.effect.mean)[:1]
    # The logit difference of the same prompts: others differ from their counterparts in length, and in difficulty.
    if best and best[0].effect.mean <= circuit.swapped_logit_diff:  # it does not turn the answer around
        return JudgedClaim(NOT_SEEN, tuple(best))
    return _judge(best)


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


def _shared(results: CircuitsResults, circuit: CircuitResults) -> JudgedClaim:
    related, unrelated = _overlaps(results, *THIRDS)
    if not related or not unrelated:
        return JudgedClaim(NOT_TESTABLE)
    # The least similar languages must share more than any unrelated pair: of so few pairs there is no test.
    outcome = CONFIRMED if min(related) > max(unrelated) else NOT_SEEN
    return JudgedClaim(outcome, related=tuple(related), unrelated=tuple(unrelated))


def _shared_middle(results: CircuitsResults, circuit: CircuitResults) -> JudgedClaim:
    overlaps = {third: _overlaps(results, third) for third in THIRDS}
    if not all(map(all, overlaps.values())):
        return JudgedClaim(NOT_TESTABLE)
    # Less what unrelated behaviours share there: late layers share features of any text.
    beyond = {third: fmean(related) - fmean(unrelated) for third, (related, unrelated) in overlaps.items()}
    outcome = CONFIRMED if beyond["middle"] > max(beyond["early"], beyond["late"], 0.0) else NOT_SEEN
    return JudgedClaim(outcome, beyond=beyond)


TESTS: Mapping[str, Callable[[CircuitsResults, CircuitResults], JudgedClaim]] = dict(
    through=functools.partial(_step, ("content",), False),
    through_entity=functools.partial(_step, ("content",), True),
    meeting=functools.partial(_step, ("content", "context"), False),
    direct=_direct,
    swap=_swap,
    shared=_shared,
    shared_middle=_shared_middle,
)

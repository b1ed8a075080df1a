"""Published claims about circuits: what came of each here, and the evidence in a sentence.

A claim is *confirmed* if the edges that it predicts are drawn, which takes an interval and two controls
(``edges.judge_edges``), or if features are shared beyond what unrelated behaviours share, and beyond chance. It is *not
seen* if they were measured and are not drawn, and *not testable* where the model does not have the behaviour, nothing
was measured, there is no test, or the claim would hold if the effects that could not be tested were drawn.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saejax.circuits.edges import Edge
from saejax.circuits.groups import ANSWER, THIRDS, is_output, third_of
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.files import read_json
from saejax.page.tables import interval, number, percent
from saejax.page.words import behaviour as title

DATA = Path(__file__).parent / "data"
CONFIRMED, NOT_SEEN, NOT_TESTABLE = "confirmed", "not seen", "not testable"
_LANGUAGES = ("antonym", "antonym_french", "antonym_spanish")
_LEVEL, _PERMUTATIONS = 0.05, 999  # of claims about shared features


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published claim, as ``data/claims.json`` has it, and what came of it here."""

    id: str  #: name of the claim
    behaviour: str  #: the behaviour that the claim is about; "": none of ours
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


class _Sharing(NamedTuple):
    """The features that return, of the behaviours that have some."""

    has_BxF: np.ndarray  #: whether a feature returns in a behaviour
    third_F: np.ndarray  #: third of the layers that it is in, as a place among ``THIRDS``
    languages: tuple[int, ...]  #: the behaviours that are languages

    @classmethod
    def read(cls, results: CircuitsResults) -> "_Sharing":
        circuits = {name: circuit for name, circuit in results.behaviours.items() if circuit.returning}
        thirds = {key.address: third_of(key.layer, c.layers) for c in circuits.values() for key in c.returning}
        returning = [{key.address for key in circuit.returning} for circuit in circuits.values()]
        has_BxF = np.array([[feature in some for feature in thirds] for some in returning], bool)
        languages = tuple(place for place, name in enumerate(circuits) if name in _LANGUAGES)
        return cls(has_BxF, np.array([THIRDS.index(third) for third in thirds.values()]), languages)

    def overlaps(self, weight_FxC: np.ndarray, languages: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the shared parts, of their union, of the features with weight 1 and not 0; NaN where none returns.

        Returns:
          Those of N pairs of languages, [N, C], and of a language with every unrelated behaviour.
        """
        languages = self.languages if languages is None else languages
        others = np.setdiff1d(np.arange(len(self.has_BxF)), languages)
        pairs = itertools.combinations(languages, 2), itertools.product(languages, others)
        shares = []
        for some in pairs:
            first_N, second_N = np.array([*some], int).reshape(-1, 2).T
            one_NxF, two_NxF = self.has_BxF[first_N], self.has_BxF[second_N]
            # Two behaviours of which nothing returned there share nothing, and differ in nothing.
            with np.errstate(invalid="ignore"):
                shares.append(((one_NxF & two_NxF) @ weight_FxC) / ((one_NxF | two_NxF) @ weight_FxC))
        return shares[0], shares[1]


def _judge_shared(claim: Claim, results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    sharing = _Sharing.read(results)
    every_Fx1 = np.ones((len(sharing.third_F), 1))
    related, unrelated = sharing.overlaps(every_Fx1)
    if not related.size or not unrelated.size:
        return NOT_TESTABLE, claim.lacks
    shares = [f"{percent(some.min())} to {percent(some.max())}" for some in (related, unrelated)]
    evidence = (
        f"Languages share {shares[0]} of the features that return, a language and an unrelated behaviour {shares[1]}."
    )
    # The least similar languages must share more than any unrelated pair.
    gap = related.min() - unrelated.max()
    if gap <= 0:
        return NOT_SEEN, evidence
    # Some behaviours share most in any case: it counts where few choices of as many would do, as languages.
    choices = [*itertools.combinations(range(len(sharing.has_BxF)), len(sharing.languages))]
    drawn = [sharing.overlaps(every_Fx1, languages) for languages in choices]
    reached = sum(some.min() - others.max() >= gap for some, others in drawn)
    evidence += f" So do {reached} of {len(choices)} choices of as many of the behaviours."
    if len(choices) * _LEVEL < 1:
        return NOT_TESTABLE, f"{evidence} It takes more unrelated behaviours."
    return (CONFIRMED if reached <= _LEVEL * len(choices) else NOT_SEEN), evidence


def _judge_shared_middle(claim: Claim, results: CircuitsResults, circuit: CircuitResults) -> tuple[str, str]:
    sharing = _Sharing.read(results)
    # The features' thirds, and the same permuted over features.
    rng, third_F = np.random.default_rng(0), sharing.third_F
    third_SxF = np.stack([third_F, *(rng.permutation(third_F) for _ in range(_PERMUTATIONS))])
    is_third_FxSx3 = third_SxF.T[:, :, None] == np.arange(len(THIRDS))
    overlaps = sharing.overlaps(is_third_FxSx3.reshape(len(third_F), -1).astype(np.float64))
    if not all(np.isfinite(share_NxC[:, : len(THIRDS)]).any(axis=0).all() for share_NxC in overlaps):
        return NOT_TESTABLE, claim.lacks
    # Less what unrelated behaviours share there: late layers share features of any text.
    related_C, unrelated_C = (
        np.nansum(share_NxC, axis=0) / np.maximum(np.isfinite(share_NxC).sum(axis=0), 1) for share_NxC in overlaps
    )
    early_S, middle_S, late_S = (related_C - unrelated_C).reshape(-1, len(THIRDS)).T
    lead_S = middle_S - np.maximum(np.maximum(early_S, late_S), 0.0)
    # One of three thirds always shares most: its lead has to be rare.
    p_value = float((lead_S >= lead_S[0] - 1e-12).mean())
    shares = ", ".join(
        f"{third} {percent(beyond[0])}" for third, beyond in zip(THIRDS, (early_S, middle_S, late_S), strict=True)
    )
    evidence = (
        f"Shared by languages beyond what unrelated behaviours share, by third of the layers: {shares} (with layers "
        f"permuted over features the middle leads as much in {percent(p_value)} of cases)."
    )
    return (CONFIRMED if lead_S[0] > 0 and p_value <= _LEVEL else NOT_SEEN), evidence


#: The tests: a claim, a run's circuits, and that of the claim's behaviour, to the outcome and its evidence.
TESTS = dict(
    path=_judge_path,
    direct=_judge_direct,
    swap=_judge_swap,
    shared=_judge_shared,
    shared_middle=_judge_shared_middle,
)

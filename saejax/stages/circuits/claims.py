"""Published claims in words: what came of each here, and the evidence in a sentence."""

import dataclasses
from collections.abc import Sequence

from saejax.circuits.claims import NOT_SEEN, Claim, JudgedClaim, judge_claim, read_claims
from saejax.circuits.edges import Edge
from saejax.circuits.groups import ANSWER
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.page.tables import interval, number, percent
from saejax.page.words import behaviour as title

_NO_PAIRS = "It takes two languages and an unrelated behaviour that the model has."
# By test, what is not drawn, or was not measured, where the claim has neither edges nor shares.
_LACKS = dict(
    through="No drawn path leads from what differs between prompts through another group to the answer.",
    through_entity="No group before those that say the answer is on a drawn path to it and carries which one it is.",
    meeting="On no group on a drawn path to the answer act both the content and the words around it.",
    direct="No group at the content acts on the answer while the other groups are held.",
    swap="No group moves the answer to the counterpart's when it takes its activations.",
    shared=_NO_PAIRS,
    shared_middle=_NO_PAIRS,
)


@dataclasses.dataclass(frozen=True)
class ComparedClaim:
    """A published claim, and what came of it here."""

    claim: Claim
    outcome: str  #: confirmed, not seen or not testable
    evidence: str  #: for the outcome, in a sentence


def compare_claims(results: CircuitsResults) -> list[ComparedClaim]:
    """Return every claim with what was measured."""
    compared = []
    for claim in read_claims():
        judged, circuit = judge_claim(claim, results), results.behaviours.get(claim.behaviour)
        if not claim.test:
            evidence = claim.note
        elif circuit and not circuit.groups:
            evidence = f"{title(claim.behaviour)}: no feature returned over the traced prompts: nothing was measured."
        elif circuit:
            evidence = f"{_describe(claim.test, judged, circuit)} {claim.note}".strip()
        else:
            why = results.left_out.get(claim.behaviour, "the behaviour was not studied in this run")
            evidence = f"{title(claim.behaviour)}: {why}."
        compared.append(ComparedClaim(claim, judged.outcome, evidence))
    return compared


def _describe(test: str, judged: JudgedClaim, circuit: CircuitResults) -> str:
    """Return the measurements by which a claim was judged, in words."""
    if judged.edges:
        evidence = _list_edges(judged.edges)
        if judged.outcome == NOT_SEEN:  # of the test "swap" alone
            evidence += (
                f" It does not turn these prompts' mean logit difference of {circuit.swapped_logit_diff:.2f} around."
            )
        return evidence
    if judged.related:
        related, unrelated = (
            f"{percent(min(shares))} to {percent(max(shares))}" for shares in (judged.related, judged.unrelated)
        )
        return (
            f"Languages share {related} of the features that return, a language and an unrelated behaviour {unrelated}."
        )
    if judged.beyond:
        shares = ", ".join(f"{third} {percent(value)}" for third, value in judged.beyond.items())
        return f"Shared by languages beyond what unrelated behaviours share, by third of the layers: {shares}."
    if test == "swap" and not circuit.swapped:
        return "Nothing was exchanged: prompts and counterparts differ in length."
    return _LACKS[test]


def _list_edges(edges: Sequence[Edge]) -> str:
    """Return edges with their effects and controls, as a sentence."""
    words = (
        f"{edge.source}{', exchanged,' if edge.edit == 'swap' else ''} to "
        f"{'the answer' if edge.target == ANSWER else edge.target}: {edge.in_unit(interval, edge.effect)} "
        f"(random {edge.in_unit(number, edge.random)}, placebo {edge.in_unit(number, edge.placebo)})"
        for edge in edges
    )
    return f"{'; '.join(words)}."

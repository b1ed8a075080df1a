"""Published claims: each has a row, and none is confirmed without a drawn edge or a control."""

import dataclasses

import numpy as np
import pytest

from saejax.circuits.edges import ANSWER, Edge, judge_edges
from saejax.circuits.groups import Group, Key
from saejax.circuits.measure import EDITS, PromptEffects
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.results import Interval
from saejax.stages.circuits.claims import CONFIRMED, NOT_SEEN, NOT_TESTABLE, TESTS, compare_claims
from saejax.tasks.settings import BEHAVIOURS

GROUPS = (
    Group("city", (Key(0, 1, "content"), Key(1, 2, "content"))),
    Group("asks", (Key(1, 3, "context"),)),
    Group("state", (Key(4, 5, "content"), Key(5, 6, "last"), Key(4, 8, "last"))),
    Group("says", (Key(7, 4, "last"),)),
)


def edge(source, target, edit="direct", drawn=True, effect=1.0):
    part = Interval(effect, effect - 0.1, effect + 0.1)
    return Edge(source, target, edit, part, 0.0, 0.0, 0.1, 0.1, part, part, 1.0, 0.99, 20, drawn)


CHAIN = (
    edge("city", "state"), edge("asks", "state"), edge("state", "says"), edge("says", ANSWER), edge("city", ANSWER),
)  # fmt: skip
EVERY = (*CHAIN, edge("city", ANSWER, "swap", effect=3.0), edge("state", ANSWER, "swap"))


def circuit(edges=EVERY, returning=GROUPS[0].members, layers=9):
    return CircuitResults(10, 20, 20, 2.0, "Austin", GROUPS, tuple(edges), tuple(returning), layers, 2.0)


def outcomes(results) -> dict[str, str]:
    return {claim.id: claim.outcome for claim in compare_claims(results)}


def test_every_claim_has_a_row():
    claims = compare_claims(CircuitsResults({}, {}))
    assert len({claim.id for claim in claims}) == len(claims) == 16
    assert {claim.behaviour for claim in claims} <= {*BEHAVIOURS, ""}
    assert {claim.test for claim in claims} <= {*TESTS, ""}
    for claim in claims:
        assert claim.source and claim.claim and (claim.test or claim.note)  # what is not tested says why
    assert {claim.outcome for claim in claims} == {NOT_TESTABLE}
    rows = compare_claims(CircuitsResults({}, {"two_hop": "the model does not have it"}))
    assert rows[0].evidence == "Capital of a city's state or country: the model does not have it."


def test_drawn_edges_confirm_claims():
    outcome_of = outcomes(CircuitsResults(dict(two_hop=circuit(), sport=circuit(), rhyme=circuit()), {}))
    for claim in ("hop-1", "hop-2", "hop-3", "hop-4", "fact-1", "rhyme-2"):
        assert outcome_of[claim] == CONFIRMED
    assert outcome_of["ant-1"] == outcome_of["add-1"] == NOT_TESTABLE
    faint = [dataclasses.replace(each, drawn=False) for each in EVERY]
    outcome_of = outcomes(CircuitsResults(dict(two_hop=circuit(faint)), {}))
    assert {outcome_of[f"hop-{n}"] for n in (1, 2, 3, 4)} == {NOT_SEEN}
    # Without counterparts of equal length nothing is swapped.
    unswapped = dataclasses.replace(circuit(), swapped=0)
    assert outcomes(CircuitsResults(dict(rhyme=unswapped), {}))["rhyme-2"] == NOT_TESTABLE
    # With counterparts of which no group was judged, nothing was seen.
    assert outcomes(CircuitsResults(dict(rhyme=circuit(CHAIN)), {}))["rhyme-2"] == NOT_SEEN


def test_inhibition_confirms_no_claim_and_nothing_measured_is_not_testable():
    inhibits = [dataclasses.replace(each, effect=Interval(-1.0, -1.1, -0.9)) for each in EVERY]
    outcome_of = outcomes(CircuitsResults(dict(two_hop=circuit(inhibits)), {}))
    assert {outcome_of[f"hop-{n}"] for n in (1, 2, 3, 4)} == {NOT_SEEN}
    empty = dataclasses.replace(circuit((), ()), groups=())
    rows = {claim.id: claim for claim in compare_claims(CircuitsResults(dict(two_hop=empty, antonym=empty), {}))}
    assert {rows[name].outcome for name in ("hop-1", "hop-2", "hop-3", "hop-4", "ant-1")} == {NOT_TESTABLE}
    assert "no feature returned over the traced prompts" in rows["hop-1"].evidence


def test_a_swap_is_compared_with_the_logit_difference_of_the_swapped_prompts():
    """Those whose counterpart has another length are not swapped, and may be easier."""
    swap = [edge("city", ANSWER, "swap", effect=1.5)]
    for logit_diff, outcome in ((1.0, CONFIRMED), (2.0, NOT_SEEN)):
        of_swapped = dataclasses.replace(circuit(swap), logit_diff=3.0 - logit_diff, swapped_logit_diff=logit_diff)
        assert outcomes(CircuitsResults(dict(two_hop=of_swapped), {}))["hop-3"] == outcome


def test_a_claim_is_not_unseen_where_its_effects_could_not_be_tested():
    """Controls of half the dose, or effects on two prompts alone, deny nothing."""
    for change in (dict(dose=0.5), dict(prompts=2)):
        untested = [dataclasses.replace(each, drawn=False, **change) for each in EVERY]
        rows = {claim.id: claim for claim in compare_claims(CircuitsResults(dict(two_hop=circuit(untested)), {}))}
        assert {rows[f"hop-{n}"].outcome for n in (1, 2, 3, 4)} == {NOT_TESTABLE}
        assert "Of 7 effects 7 could not be tested" in rows["hop-1"].evidence
    # One effect that was tested and is not drawn is enough where all ways lead through it.
    blocked = [dataclasses.replace(each, drawn=False, dose=0.99 if each.target == ANSWER else 0.5) for each in EVERY]
    assert outcomes(CircuitsResults(dict(two_hop=circuit(blocked)), {}))["hop-1"] == NOT_SEEN


SAYS = edge("says", ANSWER, "swap")


@pytest.mark.parametrize(
    ("edges", "claim"),
    [
        (CHAIN[:1] + CHAIN[2:], "hop-2"),  # the question does not join
        (CHAIN[:4], "hop-4"),
        (CHAIN, "hop-1"),  # the state does not carry which answer it is
        ([*CHAIN[:3], CHAIN[4], edge("state", ANSWER, "swap")], "hop-1"),  # it does not reach the answer
        ([edge("city", "says"), edge("says", ANSWER), SAYS], "hop-1"),  # what says the answer is no step
        ([edge("city", ANSWER, "swap", effect=1.5)], "hop-3"),  # less than the logit difference of 2
    ],
)
def test_each_claim_takes_its_own_edges(edges, claim):
    assert outcomes(CircuitsResults(dict(two_hop=circuit(edges)), {}))[claim] == NOT_SEEN


def world(seed: int, is_true: bool) -> CircuitsResults:
    """Effects on 20 prompts of groups that do what control sets do, by themselves; or of the claims' circuit, too."""
    names, rng = [group.name for group in GROUPS], np.random.default_rng(seed)
    effect_PxExGxSxH = rng.normal(size=(20, 3, 4, 5, 5))
    # A set's effect is nearly the same in all prompts; control sets are drawn anew for each.
    effect_PxExGxSxH[:, :, :, 0] = rng.normal(size=(3, 4, 5)) + 0.1 * rng.normal(size=(20, 3, 4, 5))
    if is_true:
        for known in EVERY:
            ends = EDITS.index(known.edit), names.index(known.source), [*names, ANSWER].index(known.target)
            effect_PxExGxSxH[:, ends[0], ends[1], 0, ends[2]] = 8 + 0.1 * rng.normal(size=20)
    effect_PxExGxSxH[:, :, range(4), :, range(4)] = np.nan
    effects = [PromptEffects(effect_ExGxSxH, np.ones((3, 4, 5))) for effect_ExGxSxH in effect_PxExGxSxH]
    return CircuitsResults(dict(two_hop=circuit(judge_edges(names, effects, ["a"] * 20, resamples=1000))), {})


def test_paths_and_swaps_are_confirmed_where_they_are_there():
    """100 worlds in which groups do what their controls do, and 100 in which the circuit is the claims'."""
    null, true = ([outcomes(world(seed, is_true)) for seed in range(100)] for is_true in (False, True))
    for claim in ("hop-1", "hop-2", "hop-3", "hop-4"):
        rates = [sum(found[claim] == CONFIRMED for found in worlds) for worlds in (null, true)]
        print(f"{claim}: confirmed in {rates[0]} of 100 null and {rates[1]} of 100 true worlds")
        assert rates[0] <= 8 and rates[1] >= 80


UNRELATED = ("capital", "sport", "rhyme", "addition", "acronym")


def test_sharing_is_compared_with_unrelated_behaviours():
    shared = [Key(4, n, "last") for n in range(6)]
    languages = {
        "antonym": circuit(returning=[*shared, Key(0, 1, "last"), Key(8, 1, "last")]),
        "antonym_french": circuit(returning=[*shared, Key(0, 2, "last"), Key(8, 2, "last")]),
    }
    unrelated = circuit(returning=[Key(4, 0, "context"), Key(0, 9, "last"), Key(8, 9, "last")])
    others = dict.fromkeys(UNRELATED, circuit(returning=[Key(0, 8, "last")])) | dict(capital=unrelated)
    others |= {name: circuit(returning=[Key(0, 10 + n, "last")]) for n, name in enumerate(UNRELATED[1:])}
    outcome_of = outcomes(CircuitsResults(languages | others, {}))
    assert outcome_of["ant-1"] == outcome_of["ant-3"] == CONFIRMED
    # Of three behaviours two share most in any case.
    few = compare_claims(CircuitsResults(languages | dict(capital=unrelated), {}))
    (claim,) = (each for each in few if each.id == "ant-1")
    assert claim.outcome == NOT_TESTABLE and "So do 1 of 3 choices of as many" in claim.evidence
    alike = circuit(returning=[*shared, Key(0, 1, "last"), Key(8, 1, "last")])
    assert outcomes(CircuitsResults(languages | others | dict(capital=alike), {}))["ant-1"] == NOT_SEEN
    assert outcomes(CircuitsResults(languages, {}))["ant-1"] == NOT_TESTABLE  # there is no control
    # Nothing returns in the other language, so there is nothing to share.
    silent = languages | dict(antonym_french=circuit(returning=()), capital=unrelated)
    assert outcomes(CircuitsResults(silent, {}))["ant-1"] == NOT_TESTABLE


def test_languages_that_share_as_others_do_or_in_all_layers_alike_confirm_no_claim():
    """100 worlds each: of 8 behaviours 3 are languages, which share nothing, all layers alike, or the middle ones."""
    languages, found = ("antonym", "antonym_french", "antonym_spanish"), {}
    for name, common in dict(nothing=(0, 0, 0), alike=(8, 8, 8), middle=(1, 16, 1)).items():
        rng, answers = np.random.default_rng(0), []
        for _ in range(100):
            made = {}
            for behaviour in (*languages, *UNRELATED):
                # Each third has 40 features that any behaviour may have, and some that languages have alone.
                returns_3xN = rng.random((3, 60)) < np.where(np.arange(60) < 40, 0.2, 0.0)
                if behaviour in languages:
                    returns_3xN |= (np.arange(60) >= 40) & (np.arange(60) < 40 + np.array(common)[:, None])
                    returns_3xN &= rng.random((3, 60)) < 0.8
                keys = [Key(4 * int(third), int(n), "last") for third, n in np.argwhere(returns_3xN)]
                made[behaviour] = circuit(returning=keys)
            answers.append(outcomes(CircuitsResults(made, {})))
        found[name] = [sum(each[claim] == CONFIRMED for each in answers) for claim in ("ant-1", "ant-3")]
    print(f"of 100 worlds claims of shared features, and of the middle layers, are confirmed in {found}")
    assert max(found["nothing"]) <= 8 and found["alike"][0] >= 80 and found["alike"][1] <= 8
    assert min(found["middle"]) >= 80

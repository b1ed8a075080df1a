"""The gate, alignment and the criteria: worlds where nothing is true, planted ones, and what was not measured."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from saejax.causal.claims import LEAST_SETS, Claim
from saejax.causal.study.results import StudyEffect, StudyEffects
from saejax.matching.track.results import StepTest, TrackedStep, TrackedText, TrackResults
from saejax.matching.transfer.results import ComparedPair, ComparedRows, MatchScores, TransferResults
from saejax.page.findings import Findings
from saejax.results import Interval, Summary
from saejax.studies import criteria, gather_effects
from saejax.studies.alignment import rank_correlation
from saejax.studies.results import CriterionFigures, ModelFigures, StudyFigures


def effects(zero, random) -> StudyEffects:
    """Of the mean drop of the tested set, then those of the draws, by replacement."""

    def one(drops):
        drop = Interval(drops[0], drops[0] - 1, drops[0] + 1)
        rest = dict(controls=tuple(drops[1:]), control_drop=float(np.mean(drops[1:])), p_value=0.5)
        return StudyEffect(after=drop, drop=drop, difference=drop, **rest)

    before = Interval(-1.0, -2.0, 0.0)
    return StudyEffects(before, zero=one(zero), random=None if random is None else one(random))


@pytest.mark.parametrize("shared", [0.0, 0.7, 1.0])
def test_where_nothing_is_true_few_rows_are_interpretable(shared):
    """However alike the two replacements are: at most 5 % of 2,000 worlds, and 10 % with a signal of any sort."""
    rng, found = np.random.default_rng(3), []
    for _ in range(2000):
        both_C = rng.normal(size=21)
        zero_C, random_C = (
            shared * both_C + (1 - shared**2) ** 0.5 * rng.normal(size=21) for _ in range(2)
        )  # the top features are one more draw
        found.append(criteria.gate("row", "logic", effects(zero_C, random_C), 0.99))
    share = {name: np.mean([one.gate == name for one in found]) for name in ("interpretable", "unstable", "no signal")}
    error = 3 * (0.05 * 0.95 / 2000) ** 0.5
    assert share["interpretable"] <= 0.05 + error and share["interpretable"] + share["unstable"] <= 0.1 + 2 * error
    placebo = np.mean([one.placebo_rate for one in found])
    assert placebo == pytest.approx(share["interpretable"], abs=0.015), "what stands beside an answer is its rate"


def test_the_gate_of_planted_effects():
    draws = np.linspace(-1, 1, 20)
    strong, weak = np.concatenate([[5.0], draws]), np.concatenate([[0.0], draws])

    def gate(*args):
        return criteria.gate("row", "logic", *args).gate

    assert gate(effects(strong, strong), 0.9) == "interpretable"
    assert gate(effects(strong, weak), 0.9) == gate(effects(weak, strong), 0.9) == "unstable"
    assert gate(effects(strong, strong), 0.79) == gate(effects(strong, strong), None) == "unstable"
    assert gate(effects(weak, weak), 0.9) == "no signal"
    assert gate(effects(strong, None), 0.9) == gate(effects(strong, strong), 0.9, LEAST_SETS - 1) == "not measured"
    assert gate(effects(strong, strong), 0.9, LEAST_SETS) == "interpretable"
    few = criteria.gate("row", "logic", effects(strong[:10], strong[:10]), 0.9)
    assert few.gate == "no signal" and "9 draws are too few" in few.reason


def test_rank_correlation_is_spearmans_and_finds_nothing_in_noise():
    rng = np.random.default_rng(0)
    one_N, two_N = rng.integers(0, 9, (2, 40)).astype(float)  # with ties
    assert rank_correlation(one_N, two_N)[0] == pytest.approx(spearmanr(one_N, two_N).statistic)
    p = np.array([rank_correlation(*rng.normal(size=(2, 12)))[1] for _ in range(60)])
    assert 0.3 < p.mean() < 0.7 and (p <= 0.05).mean() <= 0.15
    assert rank_correlation(one_N, one_N) == (pytest.approx(1.0), 1e-4)
    for short in (np.zeros(0), np.zeros(2), np.ones(9)):
        assert rank_correlation(short, short) == (None, None)


def empty(**changes) -> StudyFigures:
    fields = dict.fromkeys(StudyFigures.__dataclass_fields__, ()) | dict(fingerprint="0") | changes
    return StudyFigures(**fields)


def test_a_criterion_that_cannot_be_asked_is_not_met_and_not_failed():
    model = ModelFigures("row", "m", "main", "float32", None, None, None, (), (), (), (), units=3, done=2)
    found = {one.criterion: one for one in criteria.criteria(empty(models=(model,)), [])}
    assert len(found) == 9 and all(isinstance(one, CriterionFigures) for one in found.values())
    assert found["Every unit is done"].met is False and found["Every unit is done"].evidence == "2 of 3"
    assert {one.met for name, one in found.items() if name != "Every unit is done"} == {None}
    assert found["Dictionaries transfer"].evidence == "not run"


def summary_of(results) -> Summary:
    rest = dict(config={}, inputs={}, packages={}, devices=None, seeds={}, start="", seconds=1.0, files={})
    return Summary(1, "", "", "", results=results, **rest)


def match_scores(shared) -> MatchScores:
    fields = dict.fromkeys(("nearest", "nearest_back", "matched", "close"), Interval(0.5, 0.4, 0.6))
    return MatchScores(**fields, shared=Interval(shared, shared - 0.1, shared + 0.1), mutual=0.5, gap=0.0)


def transfer(shared, null) -> TransferResults:
    rows = dict(decoder=ComparedRows(match_scores(shared), match_scores(null), (8, 8), (0, 0)))
    return TransferResults((), "", (ComparedPair("topk", "standard", rows),), (), ())


def tracked(answers, placebo_rate) -> TrackResults:
    tests = {
        f"resid_post.{site}": StepTest(
            (), 3, 1.0, 0.1, 0.5, 0.1, Claim(yes, 0.1, 0.1, 0.1, 1, 0.0, 1.0, placebo_rate, 0.0, 1.0, 19), None
        )
        for site, yes in enumerate(answers)
    }
    step = TrackedStep("step 1", "", 0, 3, {}, tests, {})
    return TrackResults(dict(sum=TrackedText(9, " 4", 8, ("resid_post.0",), (step,), {}, "geometry", 7, 0, 1.0)))


@pytest.mark.parametrize(
    ("shared", "null", "answers", "placebo_rate", "met"),
    [
        (0.8, 0.1, [True] * 8, 0.05, [True, True]),
        (0.3, 0.2, [True, False], 0.2, [False, False]),  # intervals meet; one of two is no share above a fifth
        (0.8, 0.1, [], 0.0, [True, None]),
    ],
)
def test_transfer_and_tracking_are_judged_by_their_results(shared, null, answers, placebo_rate, met):
    units = {"transfer": summary_of(transfer(shared, null)), "track/sum": summary_of(tracked(answers, placebo_rate))}
    found = Findings(units, {}, Path(), {})
    (pair,), (text,) = list(gather_effects.transfer("row", found)), list(gather_effects.tracking("row", found))
    assert (pair.first, pair.second, pair.measure, pair.shared.mean, pair.shared_null.mean) == (
        "topk", "standard", "decoder", shared, null,
    )  # fmt: skip
    assert (text.text, text.tests, text.hurt, text.links) == (
        "sum", len(answers), sum(answers), 7,
    )  # fmt: skip
    judged = {one.criterion: one for one in criteria.criteria(empty(transfer=(pair,), tracking=(text,)), [])}
    names = ["Dictionaries transfer", "Features are tracked through layers"]
    assert [judged[name].met for name in names] == met

"""The gate, alignment and the criteria: worlds where nothing is true, planted ones, and what was not measured."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from saejax.interventions.answers import BehaviourVerdict, CausalAnswer
from saejax.matching.track.results import StepTest, TrackedStep, TrackedText, TrackResults
from saejax.matching.transfer.results import ComparedPair, ComparedRows, MatchScores, TransferResults
from saejax.page.findings import Findings
from saejax.results import Interval, Summary
from saejax.studies import criteria, gather_effects
from saejax.studies.alignment import rank_correlation
from saejax.studies.results import CriterionFigures, ModelFigures, StudyFigures


def result(zero, resampled, random, fooled=3, sentence="It does.") -> BehaviourVerdict:
    """A verdict with these answers."""

    def answer(text):
        return CausalAnswer(text, sentence)

    ablation = dict(answer_log_prob=answer(zero), accuracy=answer("yes"))
    if resampled:
        ablation["answer_log_prob_resampled"] = answer(resampled)
    other = answer("not tested")
    return BehaviourVerdict((1,), 1.0, ablation, {}, (), answer(random), other, {}, other, fooled, 10)


def test_the_gate():
    def gate(*args):
        return criteria.gate("row", "logic", *args).gate

    assert gate(result("yes", "yes", "yes"), 0.9) == "interpretable"
    assert gate(result("yes", "no", "yes"), 0.9) == gate(result("no", "yes", "yes"), 0.9) == "unstable"
    assert gate(result("yes", "yes", "yes"), 0.79) == gate(result("yes", "yes", "yes"), None) == "unstable"
    assert gate(result("no", "no", "yes"), 0.9) == gate(result("yes", "yes", "no"), 0.9) == "no signal"
    assert gate(result("yes", None, "yes"), 0.9) == "not measured"
    few = criteria.gate("row", "logic", result("yes", "yes", "not testable", None, "Too few sets."), 0.9)
    assert few.gate == "not measured" and few.reason == "Too few sets." and few.fooled is None
    assert criteria.gate("row", "logic", result("yes", "yes", "yes"), 0.9).fooled == 0.3


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


def tracked(answers) -> TrackResults:
    tests = {
        f"resid_post.{site}": StepTest((), 3, 1.0, 40, 19, 0.5, 0.1, 0.02, 0.02, answer)
        for site, answer in enumerate(answers)
    }
    step = TrackedStep("step 1", "", 0, 3, {}, tests, {})
    return TrackResults(dict(sum=TrackedText(9, " 4", 8, ("resid_post.0",), (step,), {}, "geometry", 7, 0, 1.0)))


@pytest.mark.parametrize(
    ("shared", "null", "answers", "met"),
    [
        (0.8, 0.1, ["yes"] * 8, [True, True]),
        (0.3, 0.2, ["yes", "no", "no", "not testable"], [False, False]),  # intervals meet; one of three is hurt
        (0.8, 0.1, ["not testable"], [True, None]),
    ],
)
def test_transfer_and_tracking_are_judged_by_their_results(shared, null, answers, met):
    units = {"transfer": summary_of(transfer(shared, null)), "track/sum": summary_of(tracked(answers))}
    found = Findings(units, {}, Path(), {})
    (pair,), (text,) = list(gather_effects.transfer("row", found)), list(gather_effects.tracking("row", found))
    assert (pair.first, pair.second, pair.measure, pair.shared.mean, pair.shared_null.mean) == (
        "topk", "standard", "decoder", shared, null,
    )  # fmt: skip
    assert (text.text, text.tests, text.hurt, text.links) == (
        "sum", len(answers) - answers.count("not testable"), answers.count("yes"), 7,
    )  # fmt: skip
    judged = {one.criterion: one for one in criteria.criteria(empty(transfer=(pair,), tracking=(text,)), [])}
    names = ["Dictionaries transfer", "Features are tracked through layers"]
    assert [judged[name].met for name in names] == met

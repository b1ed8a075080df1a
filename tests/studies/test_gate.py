"""The overall answer and alignment: worlds where nothing is true, and planted ones."""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from scipy.stats import spearmanr
from test_study_report import made_up

from saejax.activations.results import CaptureResults
from saejax.evaluation.results import EvaluateResults
from saejax.interventions.answers import AblateResults, BehaviourVerdict, CausalAnswer, VerdictConfig
from saejax.interventions.table import TESTED
from saejax.interventions.verdict import verdict
from saejax.matching.importance import rank_correlation
from saejax.matching.track.results import LensLayers, MeasuredChain, StepTest, TrackedStep, TrackedText, TrackResults
from saejax.matching.transfer.results import TransferResults
from saejax.page.findings import Findings
from saejax.results import Interval
from saejax.runner.results import Summary
from saejax.stages.study.results import StudyResults
from saejax.studies import gather, gather_features
from saejax.studies.gate import overall_answer
from saejax.studies.results import BehaviourFigures, TrackingFigures, TransferFigures
from saejax.tasks.results import BaselineBehaviour, BaselineResults, BenchmarkResults
from saejax.training.results import TrainResults

sys.path.append(str(Path(__file__).parent.parent / "interventions"))

from effect_worlds import (
    World,
    attribution,
    encode,
    planted_world,
    random_world,
    top_features,
    with_dictionary,
    world_table,
)


def result(
    ablation="yes", random="yes", placebo="yes", trained="yes", interval=(1.0, 3.0), fooled=3
) -> BehaviourVerdict:
    """A verdict with these answers to questions 1 to 4, and this interval of the effect."""
    effect = Interval(sum(interval) / 2, *interval)
    untested = CausalAnswer("not tested", "Not tested.")
    texts = (ablation, random, placebo, trained)
    one, two, three, four = (CausalAnswer(text, f"Question: {text}.", effect) for text in texts)
    ablations = dict(answer_log_prob=one, accuracy=untested)
    return BehaviourVerdict((1,), 1.0, ablations, {}, (), two, three, {}, untested, fooled, 10, four)


def test_the_gate():
    yes, vague = result(), result("no", "no", "no", interval=(-1.0, 3.0))

    def gate(*answers, items=20, spread=2.0):
        return overall_answer("row", "logic", answers, items, spread)

    # Of other seeds question 4 is not asked.
    seed = result(trained="not tested")
    assert gate(yes, seed, seed).gate == gate(yes, yes, result("no")).gate == "interpretable"
    assert gate(yes, result("no"), result(placebo="no")).gate == "unstable"
    # Seeds whose questions cannot be tested contradict nothing, where they would decide.
    untestable = result(random="not testable")
    untold = gate(yes, untestable, result("no"))
    assert untold.gate == "cannot tell" and "yes in 1 of 3 dictionaries, and in 1 not all of them" in untold.reason
    assert gate(yes, yes, untestable).gate == "interpretable"
    assert gate(yes, result("no"), result(random="no", placebo="not testable")).gate == "unstable"
    assert gate(result(placebo="no"), yes, yes).gate == "not specific"
    # The untrained dictionary answers all questions like the tested one: training is not shown to matter.
    untrained = gate(result(trained="no"), yes, yes)
    assert untrained.gate == gate(result(trained="no")).gate == "no better than untrained"
    assert untrained.reason.endswith("Controls against which the answer is not yes: untrained dictionaries, no.")
    unasked = gate(result(placebo="not testable", trained="not tested"), yes, yes)
    assert unasked.gate == "cannot tell" and (unasked.placebo, unasked.trained) == ("not testable", "not tested")
    assert unasked.reason.endswith("placebo sets, not testable; untrained dictionaries, not tested.")
    # A no decides, also where another control is not testable; a stranger's features are too few for random sets.
    few = gate(result(random="not testable", placebo="no", trained="no"))
    assert few.gate == "not specific" and "random sets, not testable; placebo sets, no" in few.reason
    for without_effect in (result("no", interval=(-0.1, 0.1)), result(random="no")):
        assert gate(without_effect, yes, yes).gate == "no signal"
    for untestable in (result(random="not testable"), result(placebo="not tested"), result("not testable")):
        assert gate(untestable, yes, yes).gate == "cannot tell"
    assert gate(yes).gate == gate(yes, yes).gate == "cannot tell"
    found = gate(vague, yes, yes)
    # A half-width of 2 nats at 20 items; half of the spread is 1, found in 80 % of cases at 2.8 standard errors.
    needed = 20 * (2.0 * 2.8015 / 1.95996) ** 2
    assert found.gate == "cannot tell" and found.items_needed == pytest.approx(needed, abs=1)
    assert f"about {found.items_needed:,} are needed" in found.reason
    assert gate(vague, yes, yes, spread=20.0).gate == "no signal"
    # A confident model, whose log-likelihood is nearly 0: items differ by more than its mean.
    confident = gate(result("no", "no", "no", interval=(-0.005, 0.005)), yes, yes, items=32, spread=0.02)
    assert confident.gate == "no signal" and confident.smallest == 0.01
    assert gate(yes, yes, yes).fooled == 0.3 and (found.seeds, found.agreeing) == (3, 2)


def judge(world: World, seed: int, features: int | None = None, **options) -> BehaviourVerdict:
    """The verdict on the features that attribution chooses in a world."""
    top = top_features(attribution(world, world.answers_Px2)[:features], 5)
    options = dict(random_sets=39, placebo_sets=39) | options
    table = world_table(world, top, seed=seed, features=features, **options)
    return verdict(table, VerdictConfig(resamples=400)).dictionaries[TESTED]["b"]


def share_right(world: World) -> float:
    """Return the share of the test prompts whose right answer has the higher logit."""
    direction_D = world.unembed_VxD[0] - world.unembed_VxD[1]
    return float((world.acts_PxF[world.test] @ world.decoder_FxD @ direction_D > 0).mean())


def overall(kind: str, worlds: Sequence[Sequence[BehaviourVerdict]]) -> collections.Counter[str]:
    """In how many worlds each overall answer is given; printed."""
    found = collections.Counter(overall_answer("row", "b", answers, 30, 1.0).gate for answers in worlds)
    print(f"{kind}: {found}")
    return found


@pytest.mark.parametrize("worlds", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_the_gate_on_worlds_where_nothing_is_true(worlds):
    """Features chosen by attribution for answers drawn at random, in three seeds; question 4 is granted."""
    found = []
    for world in range(worlds):
        seeds = [judge(random_world(seed, features=300), seed) for seed in range(3 * world, 3 * world + 3)]
        found.append([dataclasses.replace(answers, trained=CausalAnswer("yes")) for answers in seeds])
    counts = overall("nothing is true, question 4 granted", found)
    assert counts["interpretable"] <= worlds // 20 and counts["no signal"] + counts["cannot tell"] >= 0.8 * worlds


@pytest.mark.parametrize("worlds", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_the_gate_on_worlds_where_a_dictionary_has_the_true_directions_and_where_it_is_untrained(worlds):
    """Five features carry an answer. An untrained dictionary may pass questions 1 to 3 there, and so may seeds.

    In two of three worlds drawn the model answers three prompts of four rightly; the others have no behaviour to cause.
    """
    trained, untrained = [], []
    planted = (planted_world(seed, 5, drop=3.0, features=600) for seed in itertools.count())
    seeds = (seed for seed, world in enumerate(planted) if share_right(world) >= 0.75)
    for _ in range(worlds):
        seed, *others = itertools.islice(seeds, 3)
        world = planted_world(seed, 5, drop=3.0, features=600)
        # Of other seeds question 4 is not asked.
        judged = [judge(planted_world(other, 5, drop=3.0, features=600), other) for other in others]
        trained.append([judge(world, seed, untrained=19), *judged])
        acts_PxF, decoder_FxD = encode(world, 10**6 + seed)
        world = with_dictionary(world, acts_PxF, decoder_FxD)
        random = judge(world, seed, acts_PxF.shape[1], untrained=19, random_sets=0, placebo_sets=0)
        yes = CausalAnswer("yes")
        granted = dataclasses.replace(random, ablation=dict(logit_diff=yes), random=yes, placebo=yes)
        untrained.append([granted, *[dataclasses.replace(granted, trained=CausalAnswer("not tested"))] * 2])
    found = overall("true directions", trained)
    assert found["interpretable"] >= 0.8 * worlds
    assert overall("untrained, questions 1 to 3 granted", untrained)["interpretable"] <= 0.08 * worlds


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    one_N, two_N = rng.integers(0, 9, (2, 40)).astype(float)  # with ties
    assert rank_correlation(one_N, two_N)[0] == pytest.approx(spearmanr(one_N, two_N).statistic)
    assert rank_correlation(one_N, one_N) == (pytest.approx(1.0), 1e-4)
    for short in (np.zeros(0), np.zeros(2), np.ones(9)):
        assert rank_correlation(short, short) == (None, None)


def summary_of(results) -> Summary:
    rest = dict(config={}, inputs={}, packages={}, devices=None, seeds={}, start="", seconds=1.0, files={})
    return Summary(1, "", "", "", results=results, **rest)


def tracked(answers) -> TrackResults:
    tests = [StepTest((), 1.0, 40, 19, 0.1, 0.02, answer) for answer in answers]
    steps = tuple(TrackedStep(f"step {number}", "", 0, 3, test) for number, test in enumerate(tests))
    lens, site = LensLayers((), (), ()), "resid_post.0"
    chains = [MeasuredChain((), 1.0, 0.1, True, dict(yes=True, no=False).get(answer)) for answer in answers]
    text = TrackedText(9, " 4", 8, (site,), site, steps, lens, 7, chains=tuple(chains[:4]))
    return TrackResults(dict(sum=text))


def test_weak_behaviours_are_marked():
    counter, answer = itertools.count(1), CausalAnswer("yes", "", Interval(1.0, 0.5, 1.5))
    judged = dataclasses.replace(made_up(BehaviourVerdict, counter), ablation=dict(logit_diff=answer, top1=answer))
    ablate, scores = made_up(AblateResults, counter), made_up(BaselineBehaviour, counter)
    judgement = dataclasses.replace(ablate.verdict, dictionaries={TESTED: dict(one=judged, two=judged)})
    flags = dict(one=("accuracy 0.70", "separation 0.2"), two=())
    baseline = BaselineResults({name: dataclasses.replace(scores, flags=some) for name, some in flags.items()})
    results = dict(baseline=baseline, ablate=dataclasses.replace(ablate, verdict=judgement))
    units = {unit: summary_of(each) for unit, each in results.items()}
    rows = list(gather._behaviours("a", Findings(units, {}, Path(), {})))
    assert [row.weak for row in rows] == ["accuracy 0.70; separation 0.2", ""]
    assert [row[1] for row in BehaviourFigures.table(rows).rows] == ["one (weak)", "two"]


def test_steps_and_chains_are_counted():
    answers = ["yes", "no", "no", "not testable", "yes"]
    (text,) = gather.tracking("row", Findings({"track/sum": summary_of(tracked(answers))}, {}, Path(), {}))
    assert (text.text, text.tests, text.hurt, text.links) == ("sum", 4, 2, 7)
    assert (text.measured, text.holding) == (3, 1)  # of the first four chains one cannot be tested
    assert "3; 1 (1 not testable)" in TrackingFigures.table([text]).rows[0]


@pytest.mark.parametrize(
    ("categories", "count"),
    [([("algebra", "level 3")] * 2, 1), ([("algebra",), ("logic",)], 2), ([("hard",), ()], 2), ([], 0)],
)
def test_categories_are_compared_where_items_differ(categories, count):
    study = MagicMock(categories=dict(enumerate(categories)))
    (effect,) = gather._effects("row", SimpleNamespace(select=lambda kind: dict(sums=study)))
    assert effect.categories == count


def test_figures_are_the_fields_of_the_same_names():
    """Of made-up results of every stage."""
    counter = itertools.count(1)
    kinds = (StudyResults, EvaluateResults, TrainResults, CaptureResults, TransferResults)
    study, *others = (made_up(kind, counter) for kind in kinds)
    answer = CausalAnswer("yes", "", Interval(1.0, 0.5, 1.5))
    judged = dataclasses.replace(made_up(BehaviourVerdict, counter), ablation=dict(answer_log_prob=answer))
    verdict = dataclasses.replace(study.verdict, dictionaries=dict(tested=dict(sums=judged)))
    study = dataclasses.replace(study, verdict=verdict)
    names = ("study/sums", "evaluate/sums", "train/sums", "capture", "transfer")
    units = dict(zip(names, (study, *others), strict=True))
    config = dict(train=dict(epochs=3))
    units = {unit: dataclasses.replace(summary_of(each), config=config) for unit, each in units.items()}
    findings, members, captured = Findings(units, {}, Path(), {}), others[0].members, others[2].sites["tested"]
    (dictionary, *_), (site, *_, read) = gather._dictionaries("a", findings), gather._activations("a", findings)
    figures_and_results = [
        (next(gather._drivers("a", findings)), study.falsification.shares[0]),
        (next(gather_features.labels("a", findings)), study.associations.labels[0]),
        (next(gather_features.associations("a", findings)), study.associations.top[0]),
        (next(gather_features.primitives(dict(a=findings), "sums", {})), study.primitives.primitives[0]),
        (gather._domains(dict(a=findings))[0], study.domains["tested"]),
        *((dictionary, members[0]), (site, captured), (read, study.activations)),
    ]
    for figure, result in figures_and_results:
        same = vars(figure).keys() & vars(result).keys()
        differing = [name for name in same if getattr(figure, name) != getattr(result, name)]
        assert figure.row == "a" and len(same) > 1 and differing == (["tokens"] if figure is dictionary else [])
    assert (dictionary.tokens, dictionary.dead) == (others[1].tokens, members[0].dead_fraction)
    assert (site.text, site.tokens, site.l0) == ("corpus", captured.rows, None)
    assert (read.text, read.beyond_sinks) == ("sums", None)
    pair, both = next(gather.transfer("a", findings)), others[3].pairs[0].measures["tested"]
    assert (pair.measure, pair.matched, pair.shared_null) == ("tested", both.scores.matched, both.null.shared)
    nothing = dataclasses.replace(
        others[3].pairs[0], measures=dict(activity=dataclasses.replace(both, compared=(0, 9)))
    )
    some = SimpleNamespace(select=lambda kind: dict(a=dataclasses.replace(others[3], pairs=(nothing,))))
    assert TransferFigures.table(list(gather.transfer("a", some))).rows[0][3:] == ("–",) * 4


def test_generated_answers_are_judged_whatever_their_format():
    strict, flexible = Interval(0.1, 0.0, 0.3), Interval(0.6, 0.4, 0.8)
    for score, accuracy in (("generate", dict(strict=strict, flexible=flexible)), ("choice", dict(raw=flexible))):
        scores = BenchmarkResults(score, 20, "", accuracy=accuracy)
        found = Findings({"benchmark/gsm8k": summary_of(scores)}, {}, Path(), {})
        (baseline,) = gather._baselines("row", found)
        assert baseline.value == flexible

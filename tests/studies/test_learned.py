"""What a study has learned: one answer for each question, and the known answers of control rows."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from saejax.interventions.falsify import CONTROL_GROUPS
from saejax.results import Interval
from saejax.statistics.intervals import wilson
from saejax.studies.learned import QUESTIONS, _driven, answers_table, learned, overview
from saejax.studies.report import _primitives
from saejax.studies.results import (
    AlignmentFigures,
    BaselineFigures,
    DriverFigures,
    EffectFigures,
    GateFigures,
    ModelFigures,
    PrimitiveFigures,
    StudyFigures,
)


def model(row, control=""):
    return ModelFigures(row, control, "m", "main", "float32", None, None, None, (), (), (), (), 1, 1, 9.0, None, None)


def effect(row, lowers, random, placebo, trained):
    fields = dict.fromkeys((field.name for field in dataclasses.fields(EffectFigures)), None)
    answers = dict(
        row=row,
        benchmark="sums",
        lowers=lowers,
        random=random,
        placebo=placebo,
        random_nats=0.25,
        categories=2,
        can_name=True,
        dictionary="topk",
    )
    return EffectFigures(**fields | answers | dict(trained=trained))


def drivers(row, by_tokens, by_context, group="tested", features=8):
    """A group of features, of which so many are driven by tokens, and by context."""
    counts = (by_tokens, by_context, features - by_tokens - by_context)
    return DriverFigures(row, "sums", group, features, *(wilson(np.arange(features) < count) for count in counts))


def group(row, more):
    """A group of features that recurs in both other seeds."""
    effect = Interval(1.0, 0.5, 1.5)
    return PrimitiveFigures(
        row, "sums", "addition", (1, 2, 3), (), 0.9, 0.01, 0.01, 2, 2, (), None, (), 8, effect, effect, 0.0, 0.0, 19,
        19, more,
    )  # fmt: skip


@pytest.fixture
def figures():
    """A row, its relative and a stranger, which answers two questions as it must not."""
    gates = [("base", "interpretable"), ("tuned", "unstable"), ("random", "cannot tell")]
    accuracy = [("base", Interval(0.6, 0.5, 0.7)), ("random", Interval(0.3, 0.2, 0.4))]
    aligned = [
        ("tuned", "features", True, (0.9, 0.1)), ("tuned", "items", False, (None, None)),
        ("random", "features", None, (0.3, 0.1)),
    ]  # fmt: skip
    return StudyFigures(**dict.fromkeys(StudyFigures.__dataclass_fields__, ()) | dict(
        fingerprint="0",
        models=(model("base"), model("tuned", "relative"), model("random", "stranger")),
        baselines=(
            *(BaselineFigures(row, "sums", "accuracy", right, 0.25, 40) for row, right in accuracy),
            BaselineFigures("tuned", "sums", "log-likelihood, nats per token", Interval(-1, -2, 0), None, 40),
        ),
        primitives=(group("base", "yes"), group("tuned", "not testable")),
        effects=(
            effect("base", "yes", "yes", "yes", "yes"), effect("tuned", "yes", "yes", "no", "no"),
            effect("random", "no", "no", "not testable", "not tested"),
        ),
        gates=tuple(
            GateFigures(row, "sums", answer, *["yes"] * 3, "no", "Why.", 3, 2, 9, 0.5, 0.5) for row, answer in gates
        ),
        drivers=(
            drivers("base", 7, 0), drivers("tuned", 0, 8), drivers("tuned", 4, 3, "random features"),
            drivers("tuned", 8, 0, "random dictionary"),
            drivers("random", 0, 8), drivers("random", 1, 6, "random dictionary"),
        ),
        alignment=tuple(
            AlignmentFigures("base", row, "sums", by, 9, 0.5, 0.01, 0.02, 0.1, answer, *shared)
            for row, by, answer, shared in aligned
        ),
    ))  # fmt: skip


def page_of(figures):
    """What the page says of groups of features, without its figure."""
    unmeasured = [dataclasses.replace(some, effect=None) for some in figures.primitives]
    some = _primitives(Path(), dataclasses.replace(figures, primitives=tuple(unmeasured)))
    return next(block.markdown() for block in some)


def by_row(**answers):
    return {(row, question): answer for row, some in answers.items() for question, answer in some.items()}


def test_every_question_is_answered_once_with_the_known_answer_beside_it(figures):
    answers = {(one.row, one.question): one for one in learned(figures)}
    alike = dict(effect="yes", random="yes")
    assert {key: one.answer for key, one in answers.items()} == by_row(
        base=alike | dict(solves="yes", placebo="yes", trained="yes", gate="yes", context="no", primitives="yes"),
        tuned=alike
        | dict(placebo="no", trained="no", gate="no", context="yes", primitives="cannot tell")
        | dict(shared="yes", features="yes", items="no"),
        # Few of the stranger's features have a partner, so that few can be ranked: they are not the same.
        random=dict(solves="no", effect="no", random="no", context="no", primitives="no", shared="no", features="no")
        | dict.fromkeys(("placebo", "trained", "gate"), "cannot tell"),
    )
    assert {key: one.expected for key, one in answers.items() if one.expected} == by_row(
        tuned=dict.fromkeys(("shared", "features", "items"), "yes"),
        random=dict.fromkeys(("solves", "placebo", "gate", "context", "primitives", "shared", "features"), "no"),
    )
    assert answers["base", "random"].evidence == "random sets at equal dose: 0.25 nats"
    table = answers_table(learned(figures))
    assert [row[0] for row in table.rows] == ["base, sums", "tuned, sums", "random, sums"]
    assert table.rows[2][:2] == ("random, sums", "no (expected: no)")
    assert table.columns[-1] == QUESTIONS["items"].heading and table.rows[0][-1] == ""


def test_the_page_opens_with_which_rows_pass_all_controls(figures):
    figures = dataclasses.replace(figures, learned=learned(figures))
    beyond, others, untested, known = (text for _, text in overview(figures))
    assert beyond.startswith(
        "base, topk on sums (an effect: yes; more than random lists: yes; specific: yes; more than"
    )
    assert others.startswith("tuned, topk on sums: unstable (an effect: yes") and "in 2 of 3 seeds" in others
    assert untested == "random, topk on sums: Why."
    assert known.startswith("7 of 10 were found, 2 cannot be told. Contradicted: ")
    assert "for the same items as there, tuned on sums: no, expected yes (rank correlation 0.50)" in known
    plain = dataclasses.replace(figures, models=(model("base"),), gates=figures.gates[:1])
    assert len(overview(dataclasses.replace(plain, learned=learned(plain)))) == 3
    assert learned(dataclasses.replace(figures, gates=())) == ()


def test_a_model_beats_guessing_where_it_does(figures):
    """100 models that guess, and 100 that are right on half of 60 items with four choices."""
    rates = {}
    for share in (0.25, 0.5):
        rng, answers = np.random.default_rng(int(100 * share)), []
        for _ in range(100):
            accuracy = wilson(rng.random(60) < share)
            baselines = (BaselineFigures("base", "sums", "accuracy", accuracy, 0.25, 60),)
            changed = dataclasses.replace(figures, baselines=baselines, gates=figures.gates[:1])
            answers += [one.answer for one in learned(changed) if one.question == "solves"]
        rates[share] = answers.count("yes")
    print(f"beats guessing: yes in {rates[0.25]} of 100 null and {rates[0.5]} of 100 true worlds")
    assert rates[0.25] <= 8 and rates[0.5] >= 80
    # Of three questions with two choices even three right answers are no evidence.
    few = BaselineFigures("base", "sums", "accuracy", wilson(np.ones(3)), 0.5, 3)
    changed = dataclasses.replace(figures, baselines=(few,), gates=figures.gates[:1])
    assert next(one.answer for one in learned(changed) if one.question == "solves") == "cannot tell"


def test_features_of_a_dictionary_that_never_fires_have_no_partners_to_count(figures):
    silent = tuple(dataclasses.replace(pair, shared=None, shared_null=None) for pair in figures.alignment)
    answers = learned(dataclasses.replace(figures, alignment=silent))
    assert {one.answer for one in answers if one.question == "shared"} == {"cannot tell"}


def test_features_that_context_drives_as_controls_are_no_more_than_words():
    """100 groups of 12 features whose drivers are drawn like those of both controls, and 100 where context drives."""
    rates = {}
    for are_true in (False, True):
        rng, found = np.random.default_rng(are_true), []
        for _ in range(100):
            counts = rng.binomial(12, (0.95 if are_true else 0.7, *([0.3, 0.3] if are_true else [0.7, 0.7])))
            groups = ("tested", *CONTROL_GROUPS)
            rows = [drivers("base", 12 - n, n, group, 12) for group, n in zip(groups, counts, strict=True)]
            found.append(_driven(rows[0], rows[1:]))
        rates[are_true] = found.count("yes")
    print(f"more than words: yes in {rates[False]} of 100 null and {rates[True]} of 100 true worlds")
    assert rates[False] <= 8 and rates[True] >= 80
    # A control group that is missing, or has one feature, says nothing; one that is alike says no.
    tested, silent = drivers("base", 0, 8), drivers("base", 8, 0, CONTROL_GROUPS[0])
    missing, single = [silent], [silent, drivers("base", 1, 0, CONTROL_GROUPS[1], features=1)]
    alike = [*single, drivers("base", 1, 7, CONTROL_GROUPS[0])]
    assert [_driven(tested, some) for some in ([], missing, single, alike)] == ["cannot tell"] * 3 + ["no"]
    # Nor are features of which context drives no more than of a control, however few words drive.
    assert [_driven(drivers("base", 0, 0), some) for some in (missing, alike)] == ["no", "no"]
    assert _driven(drivers("base", 3, 5), missing) == "cannot tell"
    # Of fewer than six texts every feature of every group is undecided: that is no evidence, where it was a no.
    undecided = [drivers("base", 0, 0, group) for group in CONTROL_GROUPS]
    assert [_driven(drivers("base", 0, 0), some) for some in ([], undecided)] == ["cannot tell"] * 2


@pytest.mark.parametrize(
    ("recurs", "seeds", "p_recurs", "answer"),
    [
        (0, 0, None, "cannot tell"),
        (0, 2, 1.0, "no"),
        (1, 2, 0.02, "yes"),
        (2, 2, 0.2, "no"),  # names are few: as many recur by chance
        (2, 2, None, "cannot tell"),
    ],
)
def test_a_group_must_recur_in_other_seeds(figures, recurs, seeds, p_recurs, answer):
    changes = dict(recurs=recurs, seeds=seeds, p_recurs=p_recurs)
    figures = dataclasses.replace(figures, primitives=(dataclasses.replace(group("base", "yes"), **changes),))
    answers = {one.question: one.answer for one in learned(figures) if one.row == "base"}
    assert answers["primitives"] == answer
    assert ("1 group with a category could not be tested" in page_of(figures)) == (answer == "cannot tell")
    # So few items that not even the best fit would be named contradict nothing.
    few = tuple(dataclasses.replace(effect, can_name=False) for effect in figures.effects)
    unnamed = dataclasses.replace(figures, effects=few, primitives=())
    (found,) = (one for one in learned(unnamed) if (one.row, one.question) == ("base", "primitives"))
    assert found.answer == "cannot tell" and found.evidence.endswith("there are too few items to name any")
    # Of a benchmark of one category it is not asked.
    single = tuple(dataclasses.replace(effect, categories=1) for effect in figures.effects)
    assert "primitives" not in {one.question for one in learned(dataclasses.replace(figures, effects=single))}
    # Nor is anything said of too few items where there is no category to name a group after.
    nothing = dataclasses.replace(figures, primitives=())
    told = [page_of(dataclasses.replace(nothing, effects=some)) for some in (few, single)]
    assert ["Too few items chose features" in page for page in told] == [True, False]

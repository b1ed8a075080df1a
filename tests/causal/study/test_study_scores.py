"""What scores on a benchmark say: the verdict, and what few draws allow."""

import dataclasses

import numpy as np
import pytest

from saejax.causal.study import scores as study_scores
from saejax.causal.study.results import ItemScore
from saejax.settings import StudyConfig
from saejax.tasks.scoring import wilson

CONFIG = StudyConfig(
    benchmarks=("logic", "gsm8k"), items=12, top=3, draws=2, matches=4, bootstrap=200, batch_tokens=4096
)


def rows_of(right, nats):
    return [ItemScore("", "", 4 * b, 4, correct=bool(a)) for a, b in zip(right, nats, strict=True)]


def conditions_of(right, nats, draws, top_zero):
    """Rows of every condition: no draw costs anything; the top features, set to zero, cost what is given."""
    rows = {name: rows_of(right, nats) for name in study_scores.conditions(draws)}
    return rows | {"top/zero": top_zero}


def test_the_verdict():
    config = dataclasses.replace(CONFIG, min_drop=0.25, draws=20)
    right, nats = np.arange(20) < 16, np.linspace(-3, -1, 20)
    rows = conditions_of(right, nats, 20, rows_of(right & (np.arange(20) >= 8), nats - 1))
    rows["control-0/zero"] = rows_of(right & (np.arange(20) >= 1), nats - 0.25)
    found = study_scores.judge(rows, 0.5, config)
    assert (found.claims["zero"].yes, found.claims["random"].yes, found.at_chance) == (True, False, False)
    zero = found.accuracy.zero
    assert zero.drop.mean == pytest.approx(0.4) and zero.controls[:2] == pytest.approx([0.05, 0.0])
    assert zero.difference.mean == pytest.approx(0.3975) and zero.p_value == pytest.approx(1 / 21)
    assert (zero.after, found.accuracy.before) == (wilson(right & (np.arange(20) >= 8)), wilson(right))
    assert found.log_likelihood_per_token.zero.difference.mean == pytest.approx(0.9875)
    assert "Yes: with the top features set to zero, accuracy falls by 40.0 points (more than 25)" in found.reason
    assert "too few" not in found.reason
    for draw in range(2):  # controls that cost as much: p is 3 of 21
        rows[f"control-{draw}/zero"] = rows["top/zero"]
    again = study_scores.judge(rows, 0.5, config)
    assert again.claims["zero"].yes is False and again.accuracy.zero.p_value == pytest.approx(3 / 21)
    assert study_scores.judge(rows, 0.7, config).at_chance is True
    assert study_scores.at_chance(rows_of(np.arange(20) < 1, nats), 0.0) is False
    assert study_scores.at_chance(rows_of(np.arange(20) < 0, nats), 0.0) is True
    without = {name: [dataclasses.replace(r, correct=None) for r in own] for name, own in rows.items()}
    found = study_scores.judge(without, 0.0, config)
    assert found.accuracy is found.at_chance is None and "--task.score=likelihood" in found.reason


def test_draws_that_differ_do_not_let_random_sets_pass():
    """Sets whose effects differ from one another: put in the place of the top features, at most one in 20 gets a yes.

    An interval over items around the mean of the draws says yes to about half of them.
    """
    rng, config = np.random.default_rng(7), dataclasses.replace(CONFIG, min_drop=0.0, draws=40, bootstrap=200)
    yes = by_interval = 0
    for _ in range(60):
        costs = rng.normal(0.3, 0.3, 41)
        right, nats = np.ones(60, bool), rng.normal(-2, 0.1, 60)
        edited = [rows_of(rng.random(60) > max(cost, 0), nats - cost + rng.normal(0, 0.3, 60)) for cost in costs]
        rows = {"clean": rows_of(right, nats)}
        for replacement in study_scores.REPLACEMENTS:
            names = [study_scores.top_condition(replacement)]
            names += [study_scores.control_condition(draw, replacement) for draw in range(40)]
            rows |= dict(zip(names, edited, strict=True))
        found = study_scores.judge(rows, 0.0, config)
        yes += found.claims["zero"].yes
        by_interval += found.accuracy.zero.difference.low > 0
    assert yes <= 60 * (0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5) and by_interval > 15


def test_few_draws_are_said_and_several_benchmarks_corrected_for():
    right, nats = np.arange(20) < 16, np.linspace(-3, -1, 20)
    top_zero = rows_of(right & (np.arange(20) >= 8), nats - 1)
    few = study_scores.judge(conditions_of(right, nats, 10, top_zero), 0.5, dataclasses.replace(CONFIG, draws=10))
    assert few.claims["zero"].yes is False
    assert few.reason.endswith("10 draws are too few for a yes, whatever the effect: at least 19 are needed.")
    enough = study_scores.judge(conditions_of(right, nats, 20, top_zero), 0.5, dataclasses.replace(CONFIG, draws=20))
    alone = study_scores.settled(dict(logic=enough.claims))
    assert alone["logic"]["zero"] == (True, pytest.approx(1 / 21))
    both = study_scores.settled(dict(logic=enough.claims, math=enough.claims, gsm8k=dict(zero=None, random=None)))
    assert both["logic"]["zero"] == (False, pytest.approx(2 / 21)) and both["gsm8k"] == {}

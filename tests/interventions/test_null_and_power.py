"""The verdict in worlds whose truth is known: how often it says yes where nothing is true, and where something is.

Every world differs from the others in features, prompts, templates and dictionary. Of 100 worlds without an effect a
test at 5 % says yes in 8 or fewer with a probability of 94 %; the seeds are fixed.
"""

import dataclasses

import numpy as np
import pytest
from effect_worlds import World, attribution, planted_world, pool, random_world, top_features, world_table

from saejax.interventions.answers import BehaviourVerdict, VerdictConfig
from saejax.interventions.table import TESTED
from saejax.interventions.verdict import verdict

WORLDS = range(100)
K = 5


def judge(world: World, top: tuple[int, ...], seed: int, **options) -> BehaviourVerdict:
    table = world_table(world, top, seed=seed, **options)
    return verdict(table, VerdictConfig(resamples=200)).dictionaries[TESTED]["b"]


def count_yes(verdicts: list[BehaviourVerdict], question: str) -> int:
    return sum(getattr(each, question).answer == "yes" for each in verdicts)


def selected_by_attribution(world: World) -> tuple[int, ...]:
    return top_features(attribution(world, world.answers_Px2), K)


def drawn(world: World, seed: int, stream: int) -> tuple[int, ...]:
    """Return features drawn at random from those that may be in a set."""
    return tuple(np.random.default_rng([seed, stream]).choice(pool(world), K, replace=False).tolist())


def test_features_selected_for_random_answers_pass_no_more_than_the_level():
    """Train answers say nothing about test answers, so selection by attribution finds nothing."""
    worlds = [(random_world(seed), seed) for seed in WORLDS]
    verdicts = [judge(world, selected_by_attribution(world), seed) for world, seed in worlds]
    assert count_yes(verdicts, "random") <= 8
    assert count_yes(verdicts, "placebo") <= 8
    assert sum(each.ablation["logit_diff"].answer == "yes" for each in verdicts) <= 8


def test_random_features_planted_as_top_pass_no_more_than_the_level():
    """A fixed pair of answers, which some features carry; the tested set is drawn from the pool."""
    verdicts = []
    for seed in WORLDS:
        world = planted_world(seed, planted=8)
        verdicts.append(judge(world, drawn(world, seed, 1), seed))
    assert count_yes(verdicts, "random") <= 8
    assert count_yes(verdicts, "placebo") <= 8


@pytest.mark.parametrize("planted", [K, 1])
def test_an_effect_is_found_whether_it_is_spread_or_concentrated(planted):
    verdicts = []
    for seed in WORLDS:
        world = planted_world(seed, planted)
        verdicts.append(judge(world, selected_by_attribution(world), seed, placebo_sets=0))
    assert count_yes(verdicts, "random") >= 95
    assert sum(each.ablation["logit_diff"].answer == "yes" for each in verdicts) >= 95


def test_a_larger_dose_alone_is_no_effect():
    """Features that change the site five times as much as others, along directions as random as theirs.

    Compared as they are, they lose much more or gain much more than random sets; at equal dose they are like them.
    """
    answers = {True: [], False: []}
    for seed in WORLDS:
        world = random_world(seed)
        top = drawn(world, seed, 2)
        acts_PxF = world.acts_PxF.copy()
        acts_PxF[:, list(top)] *= 5
        louder = dataclasses.replace(world, acts_PxF=acts_PxF)
        for equalise, verdicts in answers.items():
            verdicts.append(judge(louder, top, seed, equalise=equalise, placebo_sets=0))
    assert count_yes(answers[True], "random") <= 8
    assert count_yes(answers[False], "random") > 20, "without equal doses the same features pass: the test can see it"

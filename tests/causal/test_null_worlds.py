"""The rule of a claim in worlds where nothing is true, and its power where something is.

A world has the features of a pool, some of which are tested, for no reason. Their effects are normal, heavy-tailed,
skewed, or strong in one of a hundred alone; the pool holds 5, 8 or 20 disjoint sets beside the tested one, shared by
all of its features or cut into one part for each; prompts add noise, or effects depend on the template.
"""

import numpy as np
import pytest
from scipy.stats import binom, norm

from saejax.causal.claims import Rule, SetEffects, claims, randomisation_p
from saejax.causal.controls import draw_alike, draw_controls
from saejax.interventions.activity import FeatureStatistics

BEHAVIOURS, SIZE, PROMPTS, TEMPLATES = 4, 20, 20, 3
RULE = Rule(resamples=200, min_accuracy_drop=0.0)

EFFECTS = dict(
    none=lambda rng, shape: np.zeros(shape),
    normal=lambda rng, shape: rng.normal(size=shape),
    heavy=lambda rng, shape: rng.standard_t(3, size=shape) / np.sqrt(3),
    skewed=lambda rng, shape: np.exp(rng.normal(size=shape)) / 2.16,
    rare=lambda rng, shape: np.where(rng.random(shape) < 0.01, 10.0, 0.3 * rng.normal(size=shape)),
)


def drawn_sets(rng, disjoint, draws, shared, tested=True):
    """Sets of features [1 + N, SIZE] of a pool of (1 + disjoint) SIZE; the tested one, 0 to SIZE - 1, comes first.

    Args:
      shared: whether every feature of the pool may stand for every tested one.
      tested: whether draws may hold tested features.
    """
    first = 0 if tested else 1
    if shared:
        sets = [rng.permutation(np.arange(first * SIZE, (1 + disjoint) * SIZE))[:SIZE] for _ in range(draws)]
    else:
        sets = rng.integers(first, 1 + disjoint, size=(draws, SIZE)) * SIZE + np.arange(SIZE)
    return np.concatenate([np.arange(SIZE)[None], sets])


def effects_of(rng, kind, by_template, sets_CxK, disjoint):
    """A behaviour: drops of the sets on each prompt, and whether the answer is lost."""
    template_P = np.arange(PROMPTS) % TEMPLATES
    effect_TxF = EFFECTS[kind](rng, (TEMPLATES if by_template else 1, (1 + disjoint) * SIZE)) / np.sqrt(SIZE)
    drop_TxC = effect_TxF[:, sets_CxK].sum(axis=2)
    drop_CxP = 1.0 + (drop_TxC - np.median(drop_TxC))[template_P if by_template else np.zeros(PROMPTS, int)].T
    drop_CxP += 0.3 * rng.normal(size=drop_CxP.shape)
    clean_P = rng.normal(2.0, 1.5, size=PROMPTS)
    lost_CxP = (clean_P > 0).astype(float) - (clean_P - drop_CxP > 0)
    return SetEffects(drop_CxP[0], lost_CxP[0], drop_CxP[1:], lost_CxP[1:], template_P, disjoint)


def share_of_yes(seed, runs, kind, disjoint, shared=True, by_template=False, draws=199, tested=True):
    """How many runs of four behaviours, in which nothing is true, say yes of anything."""
    rng, said = np.random.default_rng(seed), 0
    for _ in range(runs):
        sets_CxK = drawn_sets(rng, disjoint, draws, shared, tested)
        run = {str(b): effects_of(rng, kind, by_template, sets_CxK, disjoint) for b in range(BEHAVIOURS)}
        said += any(claim.yes for claim in claims(run, RULE).values())
    return said / runs


def limit(runs):
    return 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


@pytest.mark.slow
@pytest.mark.parametrize(("disjoint", "shared"), [(5, True), (5, False), (8, True), (20, True)])
@pytest.mark.parametrize(
    ("kind", "by_template"),
    [("none", False), ("normal", False), ("heavy", False), ("skewed", False), ("rare", False), ("normal", True)],
)
def test_where_nothing_is_true_a_run_says_yes_no_more_often_than_its_level(kind, by_template, disjoint, shared):
    assert share_of_yes(42, 1000, kind, disjoint, shared, by_template) <= limit(1000)


@pytest.mark.parametrize(
    ("kind", "by_template"), [("none", False), ("skewed", False), ("rare", False), ("heavy", True)]
)
def test_where_nothing_is_true_few_runs_say_yes(kind, by_template):
    """The same, fewer runs, on the narrowest pool that gives an answer."""
    assert share_of_yes(42, 150, kind, disjoint=5, by_template=by_template) <= limit(150)


def test_draws_without_the_tested_features_would_say_yes_too_often():
    """So the tests above can fail."""
    assert share_of_yes(42, 150, "rare", disjoint=5, tested=False) > limit(150)


def p_values(rng, runs, kind, disjoint, shared, draws=199, planted=0.0):
    """Of so many worlds, by logit difference alone; the planted effect is spread evenly over the tested features."""
    effect_RxF = EFFECTS[kind](rng, (runs, (1 + disjoint) * SIZE)) / np.sqrt(SIZE)
    effect_RxF[:, :SIZE] += planted / SIZE
    p = []
    for effect_F in effect_RxF:
        p.append(randomisation_p(effect_F[drawn_sets(rng, disjoint, draws, shared)].sum(axis=1))[0])
    return np.array(p)


@pytest.mark.parametrize("disjoint", [5, 20])
@pytest.mark.parametrize("kind", ["normal", "skewed", "rare"])
def test_p_by_itself_keeps_every_level(kind, disjoint):
    p = p_values(np.random.default_rng(7), 1000, kind, disjoint, shared=disjoint == 5)
    for level in (0.0125, 0.05, 0.2):
        assert (p <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / len(p))


def power(planted, level, disjoint, draws):
    """The probability of p <= level, computed beforehand.

    Every tested feature's effect is normal with variance 1 / SIZE, and so are those of its ``disjoint`` others. With d
    the drop of the tested set less that of the pool's mean set, normal around ``planted``, a draw is normal around the
    mean set of the tested and the others, from which the tested one is d D / (D + 1) away, and given this at most so
    many of N draws lie beyond it.
    """
    away = disjoint / (disjoint + 1)
    spread = np.sqrt(away + planted**2 * away / (disjoint + 1) / SIZE)
    grid = np.linspace(-6, 6, 4001)
    beyond = norm.sf((planted + grid * np.sqrt(1 + 1 / disjoint)) * away / spread)
    most = int(np.floor(level * (1 + draws) + 1e-9)) - 1
    return np.trapezoid(norm.pdf(grid) * binom.cdf(most, draws, beyond), grid)


@pytest.mark.parametrize(("planted", "disjoint"), [(2.5, 20), (3.0, 8), (3.5, 5)])
def test_a_planted_effect_is_found_as_often_as_computed_beforehand(planted, disjoint):
    p = p_values(np.random.default_rng(11), 1000, "normal", disjoint, shared=False, planted=planted)
    for level in (0.0125, 0.05):
        expected = power(planted, level, disjoint, 199)
        assert 0.3 < expected < 0.95 and abs((p <= level).mean() - expected) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("planted", "disjoint"), [(3.0, 20), (3.0, 8), (3.5, 5)])
def test_the_whole_rule_finds_a_planted_effect_as_often(planted, disjoint):
    """One behaviour of many prompts, whose accuracy falls with its logit difference: both p are about the same."""
    rng, runs, said = np.random.default_rng(3), 1000, 0
    clean_P = norm.isf((np.arange(1000) + 0.5) / 1000, 0.0, 12.0) + 8.0
    for _ in range(runs):
        effect_F = rng.normal(size=(1 + disjoint) * SIZE) / np.sqrt(SIZE)
        effect_F[:SIZE] += planted / SIZE
        drop_C = 8.0 + effect_F[drawn_sets(rng, disjoint, 199, shared=False)].sum(axis=1)
        lost_CxP = (clean_P > 0).astype(float) - (clean_P[None] > drop_C[:, None])
        drop_CxP = np.repeat(drop_C[:, None], len(clean_P), axis=1)
        effects = SetEffects(drop_CxP[0], lost_CxP[0], drop_CxP[1:], lost_CxP[1:], np.zeros(len(clean_P)), disjoint)
        said += claims(dict(one=effects), Rule(resamples=100))["one"].yes
    assert abs(said / runs - power(planted, 0.05, disjoint, 199)) < 0.05


def test_draws_may_hold_the_tested_features_as_often_as_others_of_the_pool():
    """Every feature alike: each stands in a draw as often, and the tested ones stand in none of the controls."""
    statistics = FeatureStatistics(1000, np.full(64, 300), np.full(64, 300.0))
    tested = list(range(10))
    draws = draw_alike(statistics, tested, 3000, 45, seed=1)
    assert all(len(set(drawn)) == 10 for drawn in draws.tolist())
    share_F = np.bincount(draws.ravel(), minlength=64) / len(draws)
    np.testing.assert_allclose(share_F[:10].mean(), 1 / 6, rtol=0.15)
    assert not np.isin(draw_controls(statistics, tested, 200, 41, seed=1), tested).any()


def test_what_a_draw_holds_lies_as_near_as_its_matches():
    fires_F = np.linspace(100, 900, 50).astype(int)
    statistics = FeatureStatistics(1000, fires_F, 1.0 * fires_F)
    tested = [20, 21, 40]
    held = draw_alike(statistics, tested, 500, 4, seed=0)
    assert {20, 21} <= set(held[:, 0].tolist()) and 40 not in held[:, 0]
    assert np.abs(held - np.array(tested)).max() <= 6

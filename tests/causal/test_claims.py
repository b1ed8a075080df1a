"""The rule of a claim where nothing is true, where something is, and in odd cases."""

import dataclasses

import numpy as np
import pytest

from saejax.causal.claims import (
    Rule,
    SetEffects,
    blocks,
    claims,
    randomisation_p,
    run_draws,
)
from saejax.causal.clustered import resampled_shares
from saejax.causal.statistics import holm

BEHAVIOURS, DRAWS, SLOTS, MATCHES, TEMPLATES = 4, 199, 20, 40, 3
RUNS = 1000
LIMIT = 0.05 + 3 * np.sqrt(0.05 * 0.95 / RUNS)


def sets_of(rng, effect_SxM, draws):
    """Effects of a tested set, one feature of each of S slots, and of draws of one of each slot's M other features."""
    own, others_SxM = effect_SxM[:, 0], effect_SxM[:, 1:]
    drawn_NxS = others_SxM[np.arange(len(own)), rng.integers(others_SxM.shape[1], size=(draws, len(own)))]
    return np.concatenate([own[None], drawn_NxS]).sum(axis=1)


def prompt_noise(rng, draws, prompts, template_P):
    """All sets cost the same but for noise on each prompt."""
    return 1.0 + rng.normal(size=(1 + draws, prompts))


def different_features(rng, draws, prompts, template_P):
    """Features have effects of their own, heavy-tailed; the tested ones are not chosen for theirs."""
    effect_SxM = rng.standard_t(3, size=(SLOTS, 1 + MATCHES)) / np.sqrt(SLOTS)
    return 1.0 + sets_of(rng, effect_SxM, draws)[:, None] + 0.5 * rng.normal(size=(1 + draws, prompts))


def correlated_prompts(rng, draws, prompts, template_P):
    """SetEffects depend on the template, which all of its prompts share."""
    per_template = [
        sets_of(rng, rng.normal(size=(SLOTS, 1 + MATCHES)) / np.sqrt(SLOTS), draws) for _ in range(TEMPLATES)
    ]
    return 1.0 + np.stack(per_template, axis=1)[:, template_P] + 0.3 * rng.normal(size=(1 + draws, prompts))


def measured(drop_CxP, clean_P, template_P):
    """As the ablation measures it: the answer is right where the logit difference is above zero."""
    lost_CxP = (clean_P > 0).astype(float) - (clean_P - drop_CxP > 0)
    return SetEffects(drop_CxP[0], lost_CxP[0], drop_CxP[1:], lost_CxP[1:], template_P)


def run_of(rng, world, prompts=60, draws=DRAWS, planted=0.0):
    template_P = np.arange(prompts) % TEMPLATES
    effects = {}
    for behaviour in range(BEHAVIOURS):
        drop_CxP = world(rng, draws, prompts, template_P)
        drop_CxP[0] += planted
        effects[str(behaviour)] = measured(drop_CxP, rng.normal(2.0, 1.5, size=prompts), template_P)
    return effects


def test_stopping_early_changes_no_answer():
    """Every run is judged with all draws, and with those after which none could change a no."""
    rng, rule, stopped = np.random.default_rng(21), Rule(resamples=100, min_accuracy_drop=0.0), 0
    for trial in range(60):
        whole = run_of(rng, different_features, draws=399, planted=2.0 * (trial % 2))
        short = {}
        for name, part in whole.items():
            both_Nx2xP = np.stack([part.draw_drop_NxP, part.draw_lost_NxP], axis=1)

            def effects(found_Nx2xP, part=part):
                return SetEffects(part.drop_P, part.lost_P, *np.moveaxis(found_Nx2xP, 1, 0), part.template_P)

            rows, short[name] = run_draws(both_Nx2xP.__getitem__, effects, 399, rule)
            assert len(rows) == short[name].draws
            stopped += short[name].draws < 399
        found, wanted = claims(short, rule), claims(whole, rule)
        assert {name: claim.yes for name, claim in found.items()} == {n: claim.yes for n, claim in wanted.items()}
    assert stopped > 60
    assert [block.stop for block in blocks(1000)] == [125, 250, 500, 1000] and len(blocks(30)) == 1


def test_too_few_disjoint_sets_give_no_yes():
    effects = run_of(np.random.default_rng(5), prompt_noise, planted=30.0)
    for disjoint, able in ((4, False), (5, True)):
        few = {name: dataclasses.replace(part, disjoint=disjoint) for name, part in effects.items()}
        assert all(claim.yes is able for claim in claims(few, Rule(resamples=100)).values())


def test_an_interval_around_the_mean_of_the_draws_is_no_rule():
    """What the rule replaces: it says yes to many random sets where features differ. So the test above can fail."""
    rng, said = np.random.default_rng(42), []
    for _ in range(100):
        effects = run_of(rng, different_features)["0"]
        beyond_P = effects.drop_P - effects.draw_drop_NxP.mean(axis=0)
        share_RxP = resampled_shares(np.arange(len(beyond_P)), 200, 0)
        said.append(np.quantile(share_RxP @ beyond_P, 0.025) > 0)
    assert np.mean(said) > 0.25


def test_one_behaviour_alone_keeps_its_level_by_logit_difference_alone():
    """The randomisation p by itself, with no help from the other conditions."""
    rng = np.random.default_rng(7)
    for world in (prompt_noise, different_features):
        p = [randomisation_p(world(rng, DRAWS, 30, np.arange(30) % TEMPLATES).mean(axis=1))[0] for _ in range(2 * RUNS)]
        assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / (2 * RUNS))


def test_the_placebo_rate_is_that_of_the_draws():
    rng = np.random.default_rng(3)
    rule = Rule(resamples=200, min_accuracy_drop=0.0)
    effects = run_of(rng, different_features, draws=399)
    found = claims(effects, rule)
    by_hand = []
    for number in range(399):  # every draw in the place of the tested set, by the rule itself
        placed = {
            name: SetEffects(
                part.draw_drop_NxP[number],
                part.draw_lost_NxP[number],
                np.delete(part.draw_drop_NxP, number, axis=0),
                np.delete(part.draw_lost_NxP, number, axis=0),
                part.template_P,
            )
            for name, part in effects.items()
        }
        by_hand.append([claim.yes for claim in claims(placed, rule).values()])
    np.testing.assert_allclose([claim.placebo_rate for claim in found.values()], np.mean(by_hand, axis=0), atol=1e-12)
    assert all(claim.placebo_low <= claim.placebo_rate <= claim.placebo_high for claim in found.values())
    assert all(claim.placebo_rate <= 0.05 for claim in found.values())


def test_a_set_that_costs_everything_passes():
    effects = run_of(np.random.default_rng(5), different_features, planted=8.0)
    found = claims(effects, Rule(resamples=200))
    assert all(claim.yes and claim.low > 0 and claim.p_holm <= 0.05 for claim in found.values())


def test_too_few_draws_cannot_say_yes_and_are_said_to():
    effects = run_of(np.random.default_rng(5), different_features, draws=20, planted=8.0)
    found = claims(effects, Rule(resamples=200))
    assert not any(claim.yes for claim in found.values()) and all(claim.least_draws == 79 for claim in found.values())
    assert Rule().least_draws(4) == 79 and Rule().least_draws(1) == 19
    for draws, able in ((79, True), (78, False)):
        some = run_of(np.random.default_rng(5), prompt_noise, draws=draws, planted=30.0)
        assert all(claim.yes is able for claim in claims(some, Rule(resamples=50)).values())


def test_accuracy_counts_too():
    """Logit differences fall much, but no answer changes."""
    rng = np.random.default_rng(5)
    drop_CxP = different_features(rng, DRAWS, 30, np.arange(30) % 3)
    drop_CxP[0] += 20
    effects = measured(drop_CxP, np.full(30, 100.0), np.arange(30) % 3)
    claim = claims(dict(one=effects), Rule())["one"]
    assert claim.p_logit_diff == 1 / (1 + DRAWS) and claim.p_accuracy == 1.0 and not claim.yes


def test_equal_effects_are_at_least_as_large():
    np.testing.assert_array_equal(
        randomisation_p(np.array([1.0, 1.0 + 1e-13, 1.0 - 1e-13, 0.0])), [0.75, 2 / 3, 2 / 3, 1]
    )
    np.testing.assert_array_equal(randomisation_p(np.zeros(5)), np.ones(5))


def test_one_prompt_and_no_behaviour():
    one = SetEffects(np.ones(1), np.ones(1), np.zeros((19, 1)), np.zeros((19, 1)), np.zeros(1))
    assert claims(dict(one=one), Rule())["one"].yes
    assert claims({}, Rule()) == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_effects_that_are_not_finite_are_refused(bad):
    one = SetEffects(np.array([bad]), np.ones(1), np.zeros((19, 1)), np.zeros((19, 1)), np.zeros(1))
    with pytest.raises(ValueError, match="finite"):
        claims(dict(one=one), Rule())


def test_holm_by_columns_is_holm():
    p_BxC = np.random.default_rng(0).uniform(size=(5, 7)) ** 3
    np.testing.assert_allclose(holm(p_BxC), np.stack([holm(p_B) for p_B in p_BxC.T], axis=1))


def test_the_interval_of_a_claim_resamples_templates():
    """Three templates, each with an effect of its own: other templates would give another mean."""
    drop_P, nothing_NxP = np.repeat([0.5, 1.0, 3.0], 10), np.zeros((19, 30))
    lows = []
    for template_P in (np.repeat(np.arange(3), 10), np.zeros(30)):
        effects = SetEffects(drop_P, np.ones(30), nothing_NxP, nothing_NxP, template_P)
        lows.append(claims(dict(one=effects), Rule())["one"].low)
    assert lows[0] == 0.5 and lows[1] > 1.0


def test_resampling_templates_widens_what_resampling_prompts_gives():
    template_P = np.repeat(np.arange(4), 10)
    value_P = np.repeat([0.0, 1.0, 2.0, 3.0], 10)
    by_template = (resampled_shares(template_P, 4000, 0) @ value_P).std()
    by_prompt = (resampled_shares(np.arange(40), 4000, 0) @ value_P).std()
    np.testing.assert_allclose(by_prompt, value_P.std() / np.sqrt(40), rtol=0.05)
    np.testing.assert_allclose(by_template, value_P.std() / np.sqrt(4), rtol=0.05)
    np.testing.assert_allclose(resampled_shares(template_P, 10, 0).sum(axis=1), 1.0)

"""What an ablation measures: which sets it compares, at which doses, and that the verdict follows from the table."""

import numpy as np
import pytest

import saejax
from saejax.errors import UserError
from saejax.interventions import ablation as ablation_module
from saejax.interventions import edits, engine
from saejax.interventions.ablation import (
    FRACTIONS,
    BehaviourAblation,
    RowProgress,
    measure_behaviour,
    spread_over_templates,
)
from saejax.interventions.answers import VerdictConfig
from saejax.interventions.table import TESTED, TEXT, UNTRAINED
from saejax.interventions.verdict import verdict
from saejax.settings import AblateConfig
from saejax.statistics.partition import disjoint_sets
from saejax.tasks.behaviours import Prompt

TOP = 4
BASES = ("neurons", "pca", "diff_means", "untrained")


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def ablation(tiny, dictionary, make_prompt):
    prompts = [make_prompt(i, "train" if i < 10 else "test", name) for name in ("first", "second") for i in range(18)]
    documents = ["The river follows the old road to the sea."] * 3
    settings = dict(top=TOP, placebo_targets=12, bootstrap=500, effects="all")
    return saejax.ablate(tiny, dictionary, prompts, documents=documents, **settings)


def members(table, group, dictionary=TESTED, behaviour="first"):
    whole = {edit.index: set(edit.features) for edit in table.select_edits(behaviour, group, dictionary)}
    return list(whole.values())


@pytest.mark.parametrize("owner", [TESTED, UNTRAINED])
def test_random_sets_hold_no_tested_feature_and_share_none(ablation, owner):
    (top,) = members(ablation.table, "top", owner)
    sets = members(ablation.table, "random", owner)
    assert len(top) == TOP and len(sets) > 4
    assert all(len(chosen) == TOP and not chosen & top for chosen in sets)
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_features_of_random_sets_fire_on_five_percent_of_test_prompts(tiny, ablation, dictionary, make_prompt):
    test = [make_prompt(i, "test", "first") for i in range(10, 18)]
    pool = sorted(set().union(*members(ablation.table, "random")))
    norm_FxP = engine.effects(tiny, test, edits.mask(dictionary, [[f] for f in pool]), ("change_norm",))[:, :, 0]
    assert ((norm_FxP > 0).mean(axis=1) >= 0.05).all()


def test_placebo_targets_are_two_tokens_and_no_answers(ablation):
    placebos = ablation.table.select_edits("first", "placebo")
    assert len({edit.index for edit in placebos}) == 12
    for edit in placebos:
        right, wrong = (text.strip() for text in edit.target)
        assert right != wrong
        for answer in ("runs", "the", "far", "way"):
            assert not answer.startswith(right) and not answer.startswith(wrong)


def test_likely_tokens_that_are_answers_are_no_placebo_targets(tiny, dictionary, make_prompt, monkeypatch):
    """The likely tokens are made to be the answers and ten others; only these are drawn."""
    prompts = [make_prompt(i, "train" if i < 10 else "test", "only") for i in range(18)]
    ids = {word: tiny.token_id(word) for prompt in prompts for word in (prompt.correct, prompt.wrong)}
    others = [token for token in range(100, 383) if tiny.tokenizer.decode([token]).strip().isalpha()]
    others = [token for token in others if token not in ids.values()][:30]
    monkeypatch.setattr(ablation_module, "likely_tokens", lambda *_: np.unique([*ids.values(), *others]))
    config = AblateConfig(top=TOP, placebo_targets=500)
    one = BehaviourAblation(tiny, dictionary, "only", prompts, config, RowProgress())
    drawn = {tiny.tokenizer.decode([token]).strip() for token in one.placebo_targets().ravel().tolist()}
    assert drawn and not any(answer.strip().startswith(text) for text in drawn for answer in ids)


@pytest.mark.parametrize("replacement", ["random", "zero"])
def test_draws_of_another_behaviour_do_not_depend_on_a_third(tiny, dictionary, make_prompt, replacement):
    names, settings = ("first", "second", "third"), dict(top=TOP, random_sets=1, placebo_targets=1, untrained=False)
    prompts = {name: [make_prompt(i, "train" if i < 6 else "test", name, False) for i in range(10)] for name in names}
    config = AblateConfig(**settings, baselines=(), replacement=replacement)
    values = []
    for others in (("second", "third"), ("second",), ("third",)):
        some = {name: prompts[name] for name in ("first", *others)}
        table, _ = measure_behaviour(tiny, dictionary, "first", some, config)
        edit = table.select_edits("first", "top")[-1]
        values += [table.values([edit], table.select_prompts(name), "logit_diff")[0] for name in others]
    np.testing.assert_allclose(values[0], values[2], atol=1e-5)
    np.testing.assert_allclose(values[1], values[3], atol=1e-5)
    assert np.isfinite(values).all()


def broken_random_sets(self, top):
    """Random sets drawn from a pool that holds the tested features."""
    pool = np.flatnonzero(self.statistics.prompts_F / len(self.test) >= 0.05)
    first = [*top[:1], *np.setdiff1d(pool, top)[: len(top) - 1]]
    rest = disjoint_sets(np.setdiff1d(pool, first), len(top), 12, 0)
    return np.concatenate([[first], rest])


def broken_placebo_targets(self):
    """Placebo targets of which the last is the answer."""
    answers = [self.lm.token_id(text) for text in (self.prompts[0].correct, self.prompts[0].wrong)]
    return np.array([[301, 302], answers])


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("random_sets", broken_random_sets, "random set 0 of only shares feature .* with the top features"),
        ("placebo_targets", broken_placebo_targets, "placebo target 1 of only is an answer"),
    ],
)
def test_a_run_that_breaks_the_rule_gets_no_verdict(tiny, dictionary, make_prompt, monkeypatch, name, broken, message):
    prompts = [make_prompt(i, "train" if i < 10 else "test", "only") for i in range(18)]
    monkeypatch.setattr(BehaviourAblation, name, broken)
    options = dict(top=TOP, placebo_targets=2, baselines=(), untrained=False, bootstrap=200)
    with pytest.raises(UserError, match=message):
        saejax.ablate(tiny, dictionary, prompts, **options)


@pytest.mark.parametrize("group", ["random", "placebo"])
def test_sets_of_a_larger_dose_are_ablated_again_at_the_dose_of_the_top_features(ablation, group):
    table = ablation.table
    prompts = table.select_prompts("first")

    def dose(edit):
        return float(np.sqrt(np.mean(table.values([edit], prompts, "change_norm") ** 2)))

    limit = dose(table.select_edits("first", "top")[-1])
    by_index = {}
    for edit in table.select_edits("first", group):
        by_index.setdefault(edit.index, []).append(edit)
    reduced = 0
    for measured in by_index.values():
        assert measured[-1].fraction == 1.0 and len(measured) == 1 + (dose(measured[-1]) > limit)
        if len(measured) == 2:
            assert dose(measured[0]) == pytest.approx(limit, rel=1e-9)
            reduced += 1
    assert group == "random" or reduced > 0


def test_doses_and_effects_are_those_of_the_engine(tiny, ablation, dictionary, make_prompt):
    test = [make_prompt(i, "test", "first") for i in range(10, 18)]
    table, readouts = ablation.table, ("logit_diff", "change_norm")
    chosen = [*table.select_edits("first", "top")[::4], *table.select_edits("first", "placebo")[:4]]
    batch = edits.mask(dictionary, [edit.features for edit in chosen], [edit.fraction for edit in chosen])
    want = engine.effects(tiny, test, batch, readouts)
    for r, readout in enumerate(readouts):
        got_ExP = table.values(chosen, table.select_prompts("first"), readout)
        np.testing.assert_allclose(got_ExP, want[:, :, r], atol=2e-5)


@pytest.mark.parametrize("basis", BASES)
def test_bases_reach_the_dose_of_the_features_and_go_no_further(ablation, basis):
    table = ablation.table
    prompts = table.select_prompts("first")
    grid, top = (table.select_edits("first", group) for group in (f"basis:{basis}", "top"))
    dose_A, limit_A = (
        np.sqrt(np.mean(table.values(chosen, prompts, "change_norm") ** 2, axis=1)) for chosen in (grid, top)
    )
    assert len(grid) == len(top) == len(FRACTIONS)
    assert dose_A[-1] <= limit_A[-1] * (1 + 1e-9)
    if dose_A[-1] > 0.999 * limit_A[-1]:
        np.testing.assert_allclose(dose_A, limit_A, rtol=1e-6)
    kl_AxN = table.values(grid, table.select_prompts(TEXT), "kl")
    assert np.isfinite(kl_AxN).all(axis=1).sum() == 2


def test_the_verdict_is_that_of_the_table_and_covers_both_dictionaries(ablation):
    assert verdict(ablation.table, VerdictConfig(resamples=500)) == ablation.verdict
    assert set(ablation.verdict.dictionaries) == {TESTED, UNTRAINED}
    for answers in ablation.verdict.dictionaries.values():
        assert set(answers) == {"first", "second"}
        assert answers["first"].selective.answer != "not tested"


def test_every_live_feature_is_ranked_beside_estimates(ablation):
    importance = ablation.importance["first"]
    edits_F = [edit.index for edit in ablation.table.select_edits("first", "every")]
    assert importance.feature.tolist() == edits_F and len(edits_F) > 50
    assert (importance.drop_low <= importance.drop + 1e-9).all() and (importance.p_fwer > 0).all()
    assert importance.summary.attribution_correlation > 0.5


def test_without_another_behaviour_selectivity_is_not_tested(tiny, dictionary, make_prompt):
    prompts = [make_prompt(i, "train" if i < 10 else "test", "only") for i in range(18)]
    found = saejax.ablate(
        tiny, dictionary, prompts, top=2, placebo_targets=0, baselines=(), untrained=False, bootstrap=200
    )
    assert found.verdict.dictionaries[TESTED]["only"].selective.answer == "not tested"


def test_named_features_are_those_that_are_ablated(tiny, dictionary, make_prompt):
    prompts = [make_prompt(i, "train" if i < 10 else "test", "only") for i in range(18)]
    options = dict(placebo_targets=0, baselines=(), untrained=False, bootstrap=200)
    found = saejax.ablate(tiny, dictionary, prompts, features=[5, 60], **options)
    assert found.verdict.dictionaries[TESTED]["only"].features == (5, 60)
    assert not {5, 60} & set().union(*members(found.table, "random", behaviour="only"))
    # The ranking's attribution is that of the model, in logits, whoever chose the features.
    assert all(abs(effect.attribution) < 1.0 for effect in found.top["only"])
    with pytest.raises(UserError, match="train"):
        saejax.ablate(tiny, dictionary, prompts[10:], **options)


def test_prompts_for_attribution_are_spread_over_templates():
    prompts = [Prompt("b", "train", str(i), "", "", template="a" if i < 8 else "c") for i in range(10)]
    assert [prompt.text for prompt in spread_over_templates(prompts, 4)] == ["0", "1", "8", "9"]
    assert len(spread_over_templates(prompts, 0)) == 10

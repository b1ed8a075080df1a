"""Primitives of a benchmark: planted groups of features are found and named, and none where there are none.

And features chosen on one benchmark and ablated on another: effects of the formula, beside random sets without them.
"""

import dataclasses

import numpy as np
import pytest
from scipy.stats import ttest_ind

from saejax.interventions.ablation import FRACTIONS
from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition
from saejax.studies import primitives
from saejax.studies.primitives import (
    CHOSEN_ON,
    GROUP,
    LEVEL,
    FeaturePrimitive,
    category_contrasts,
    find_primitives,
    judge_domains,
    judge_primitives,
    recurrence_p,
    recurring,
)

CATEGORIES = ("addition", "logic", "subtraction")
ITEMS, FEATURES, SIZE = 45, 80, 4
IDS = [f"item {i}" for i in range(ITEMS)]


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(primitives, "_RESAMPLES", 20)
    monkeypatch.setattr(primitives, "_PERMUTATIONS", 199)


def make_attributions(seed, planted):
    """Attributions of features: noise of any size, and ``planted`` groups of 4, each of which varies by category."""
    rng = np.random.default_rng(seed)
    categories = rng.permutation(np.repeat(CATEGORIES, ITEMS // len(CATEGORIES)))
    rows_PxF = rng.normal(0.2, 1, (ITEMS, FEATURES)) * rng.lognormal(0, 0.3, FEATURES)
    groups = {}
    for name in CATEGORIES[:planted]:
        groups[name] = rng.choice(np.setdiff1d(np.arange(FEATURES), np.array([*groups.values()])), SIZE, replace=False)
        shared_P = 3.0 * (categories == name) + rng.normal(0, 0.5, ITEMS)
        rows_PxF[:, groups[name]] = shared_P[:, None] + 0.4 * rng.normal(size=(ITEMS, SIZE))
    return rows_PxF, [(name,) for name in categories.tolist()], groups


@pytest.mark.parametrize("planted", [1, 3])
def test_planted_groups_are_found_and_named(planted):
    rows_PxF, categories, groups = make_attributions(planted, planted)
    found = find_primitives(rows_PxF, IDS, categories, 0)
    named = {one.name: one for one in found.primitives if one.name}
    assert set(named) == set(groups)
    for name, one in named.items():
        assert set(one.features) == set(groups[name].tolist())
        assert one.overlap >= 0.5 and one.p_value <= 0.05
        assert all(categories[IDS.index(item)] == (name,) for item in one.examples)
    again = find_primitives(make_attributions(planted, 1)[0], IDS, categories, 0)
    assert recurring(found.primitives, again.primitives)[0] == (found.primitives[0].name in {"addition"})


def test_names_that_recur_are_compared_with_permuted_names():
    """In 200 worlds names are drawn at random; in 100 two of five names return in both other seeds."""
    categories, rng = ["a", "b", "c", "d", "e"], np.random.default_rng(0)

    def groups(names):
        return [FeaturePrimitive(name, (0, 1, 2), 0.9, 3.0, 0.01, ()) for name in names]

    draw = lambda: groups(rng.choice(categories, 2, replace=False))  # noqa: E731
    null = [recurrence_p(draw(), [draw(), draw()], categories, seed) for seed in range(200)]
    assert sum(p <= LEVEL for p in null) <= 16
    true = [recurrence_p(groups("ab"), [groups("ba"), groups("ab")], categories, seed) for seed in range(100)]
    assert all(p <= LEVEL for p in true) and np.mean(true) == pytest.approx(1 / 100, abs=0.01)
    assert recurrence_p(groups("a"), [groups("a")], categories[:3], 0) is None  # one in three by chance


def test_nothing_is_named_where_nothing_was_planted():
    found = []
    for seed in range(40):
        rows_PxF, categories, _ = make_attributions(100 + seed, 0)
        found.append(find_primitives(rows_PxF, IDS, categories, seed).primitives)
    assert sum(map(bool, found)) <= 6  # 5 % of 40, and the error of 20 shuffles
    assert sum(any(one.name for one in some) for some in found) <= 2


def test_groups_that_have_nothing_to_do_with_categories_have_no_name():
    rows_PxF, categories, _ = make_attributions(3, 1)
    shuffled = [categories[i] for i in np.random.default_rng(0).permutation(len(categories))]
    found = find_primitives(rows_PxF, IDS, shuffled, 0)
    assert found.primitives and not any(one.name for one in found.primitives)
    for alone in ([()] * ITEMS, [("sums",)] * ITEMS):
        found = find_primitives(rows_PxF, IDS, alone, 0)
        assert found.primitives and not any(one.name for one in found.primitives)


def test_an_item_may_be_of_several_categories():
    rows_PxF, categories, groups = make_attributions(1, 1)
    levels = [(*some, f"level {i % 3}") for i, some in enumerate(categories)]
    named = {one.name: one for one in find_primitives(rows_PxF, IDS, levels, 0).primitives if one.name}
    assert {name: {*one.features} for name, one in named.items()} == {"addition": {*groups["addition"].tolist()}}


def test_contrasts_are_those_of_the_t_test_up_to_the_pooled_variance():
    rng = np.random.default_rng(0)
    profile_GxP, category_P = rng.normal(size=(2, 30)), np.repeat(["a", "b", "c"], 10)
    inside_CxP = np.unique(category_P)[:, None] == category_P[None, :]
    contrast_GxC, p_GxC = category_contrasts(profile_GxP, inside_CxP, 0)
    for g in range(2):
        inside = profile_GxP[g, category_P == "b"], profile_GxP[g, category_P != "b"]
        assert np.sign(contrast_GxC[g, 1]) == np.sign(ttest_ind(*inside).statistic)
        wanted = (inside[0].mean() - inside[1].mean()) / (profile_GxP[g].std(ddof=1) * np.sqrt(1 / 10 + 1 / 20))
        assert contrast_GxC[g, 1] == pytest.approx(wanted)
    assert p_GxC.min() > 0 and p_GxC.max() <= 1


def test_correlated_groups_that_have_nothing_to_do_with_categories_have_no_name_either():
    """Of 320 features in 80 groups those are grouped that are most important, which must not depend on the labels."""
    stable, named = 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shared_PxG = rng.normal(0.1, 1, (ITEMS, 80))
        rows_PxF = np.repeat(shared_PxG, SIZE, axis=1) + 0.4 * rng.normal(size=(ITEMS, 80 * SIZE))
        categories = rng.permutation(np.repeat([f"category {c}" for c in range(9)], ITEMS // 9))[:, None].tolist()
        found = find_primitives(rows_PxF, IDS, categories, seed).primitives
        stable, named = stable + len(found), named + sum(bool(one.name) for one in found)
    assert stable > 100 and named <= 0.05 * stable


def prompts_of(items):
    """Items of two categories in turn: additions come first."""
    prompts = [PromptDefinition(f"sums/{i:02d}", "sums") for i in range(items)]
    return prompts, {prompt.id: (("addition", "logic")[i % 2],) for i, prompt in enumerate(prompts)}


def table_of(prompts, edits, measure):
    """A table of the log-likelihoods that edits lose and of their doses, which ``measure`` gives of each."""
    value_2xExP = np.swapaxes(
        [measure(edit) if edit.group != "clean" else np.zeros((2, len(prompts))) for edit in edits], 0, 1
    )
    return EffectsTable.block(edits, prompts, dict(answer_log_prob=-5 - value_2xExP[0], change_norm=value_2xExP[1]))


def make_table(strength, items=20, sets=39, groups=1, control=0.0, outside=1.0):
    """Groups of additions that lose ``strength`` on them; sets lose ``control`` and noise of 0.1.

    The change of a set has a norm of 1 on additions, as that of a group has everywhere, and ``outside`` on others.
    """
    rng = np.random.default_rng(1)
    prompts, categories = prompts_of(items)
    is_sum_P = np.array(["addition" in some for some in categories.values()])
    edits = [EditDefinition("sums", "clean")]
    for number in range(groups):
        features = (1, 2, 3 + number)
        edits += [EditDefinition("sums", f"{GROUP}{number}", 0, features, fraction) for fraction in FRACTIONS]
    for group in ("random", "placebo"):
        edits += [EditDefinition("sums", group, i, (10 + 3 * i, 11 + 3 * i)) for i in range(sets)]

    def measure(edit):
        if edit.group.startswith(GROUP):
            return strength * edit.fraction * is_sum_P, np.full(items, edit.fraction)
        return control + 0.1 * rng.normal(size=items), np.where(is_sum_P, 1.0, outside)

    return table_of(prompts, edits, measure), categories


def judge(table, categories, *groups):
    """Effects of groups, each a category and its features."""
    every = [FeaturePrimitive(name, features, 0.9, 4.0, 0.01, ("sums/00",)) for name, features in groups]
    return judge_primitives(table, "sums", every, categories, 200, 0)


@pytest.mark.parametrize(("strength", "answer"), [(1.0, "yes"), (0.0, "no")])
def test_the_effect_of_a_primitive_on_the_items_of_its_category(strength, answer):
    (found,) = judge(*make_table(strength), ("addition", (1, 2, 3)), ("addition", (1, 2, 4)))
    assert found.items == 10 and found.effect.mean == pytest.approx(strength)
    assert found.elsewhere.mean == pytest.approx(0.0) and found.answer == answer
    assert abs(found.random) < 0.1 and abs(found.placebo) < 0.1
    assert (found.sets, found.needed) == (39, 19)


@pytest.mark.parametrize(("sets", "tested"), [(5, 0), (18, 0), (19, 1), (38, 1), (39, 2), (59, 3), (79, 4)])
def test_as_many_groups_are_tested_as_the_sets_allow(sets, tested):
    groups = [("addition", (1, 2, 3 + number)) for number in range(4)]
    found = judge(*make_table(1.0, sets=sets, groups=4), *groups)
    assert [one.answer for one in found] == ["yes"] * tested + ["not testable"] * (4 - tested)
    assert [one.needed for one in found] == [20 * tested - 1] * tested + [20 * tested + 19] * (4 - tested)
    assert all((one.p_random is None) == (one.answer == "not testable") for one in found)


def test_sets_that_share_a_feature_do_not_count():
    # The first group shares a feature with one random set, so that 18 are left; the second can be tested.
    groups = ("addition", (1, 2, 10)), ("addition", (1, 2, 4))
    first, second = judge(*make_table(1.0, sets=19, groups=2), *groups)
    assert (first.answer, first.sets, first.p_random) == ("not testable", 18, None)
    assert (second.answer, second.sets, second.p_random) == ("yes", 19, 1 / 20)


def test_doses_are_those_on_the_items_of_the_category():
    # Sets cost twice what the group does at an equal change of additions; they change other items ten times as much.
    table, categories = make_table(1.0, control=2.0, outside=10.0)
    (found,) = judge(table, categories, ("addition", (1, 2, 3)))
    assert found.random == pytest.approx(2.0, abs=0.1) and found.answer == "no"
    # Averaged over all items the group would lose less than the sets.
    (found,) = judge(*make_table(1.0, control=0.7), ("addition", (1, 2, 3)))
    assert found.random == pytest.approx(0.7, abs=0.1) and found.answer == "yes"


def test_a_category_without_test_items_does_not_hide_the_others():
    table, categories = make_table(1.0, groups=2)
    (found,) = judge(table, categories, ("division", (1, 2, 3)), ("addition", (1, 2, 4)))
    assert (found.group, found.answer) == (1, "yes")


# Features chosen on one benchmark and ablated on another


def judge_chosen(strength, features, shuffle=False):
    """The effect of features that another benchmark chose, and the dose of each item.

    Every set loses its strength per unit of dose; random set i holds features 100 + 2 i and the next.
    """
    rng = np.random.default_rng(0)
    prompts, _ = prompts_of(40)
    edits = [EditDefinition("sums", "clean")]
    edits += [EditDefinition("sums", "random", i, (100 + 2 * i, 101 + 2 * i)) for i in range(30)]
    for group, members in (("top", (50, 2)), (CHOSEN_ON + "gsm8k", features)):
        edits += [EditDefinition("sums", group, 0, members, fraction) for fraction in FRACTIONS]
    size_P = rng.uniform(0.5, 1.5, 40)

    def measure(edit):
        per_dose = dict(top=2.0, random=rng.normal() * 0.1).get(edit.group, strength)
        return per_dose * edit.fraction * size_P, edit.fraction * size_P

    table = table_of(prompts, edits, measure)
    if shuffle:
        order_N = np.random.default_rng(1).permutation(len(table.value_N))
        names = ("edit_N", "prompt_N", "readout_N", "value_N")
        table = dataclasses.replace(table, **{name: getattr(table, name)[order_N] for name in names})
    (effect,) = judge_domains(table, "sums", 500, 0).values()
    return effect, size_P


def test_an_effect_beyond_random_sets():
    effect, size_P = judge_chosen(1.0, (50, 51))
    assert effect.effect.mean == pytest.approx(size_P.mean()) and effect.effect.low > 0.8
    assert effect.p_value == pytest.approx(1 / 31) and abs(effect.random) < 0.1
    assert (effect.random_sets, effect.common) == (30, 1)


def test_no_effect_and_random_sets_that_hold_the_features():
    effect, _ = judge_chosen(0.0, (100, 103))
    assert effect.p_value > 0.05 and effect.random_sets == 28
    assert judge_chosen(0.0, (100, 103), shuffle=True)[0] == effect

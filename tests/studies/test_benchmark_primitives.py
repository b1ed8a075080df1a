"""Primitives of a benchmark: planted groups of features are found and named, and none where there are none.

And features chosen on one benchmark and ablated on another: effects of the formula, beside random sets without them.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_ind

from saejax.interventions.benchmark import control_group
from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition
from saejax.studies import gather_features, primitives
from saejax.studies.primitives import (
    CHOSEN_ON,
    GROUP,
    LEVEL,
    FeaturePrimitive,
    category_contrasts,
    count_testable,
    find_primitives,
    judge_domains,
    judge_primitives,
    recurrence_p,
    recurring,
)
from saejax.studies.results import PrimitiveFigures

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


def test_names_in_other_rows_are_compared_with_permuted_names():
    """In 100 studies of three rows names are drawn at random; in 100 two of five names are those of all rows."""
    categories, rng = ["a", "b", "c", "d", "e"], np.random.default_rng(1)

    def row(names, of_items):
        groups = tuple(FeaturePrimitive(name, (0, 1, 2), 0.9, 3.0, 0.01, ()) for name in names)
        found = SimpleNamespace(primitives=groups, effects=(), seeds={}, p_recurs=None)
        results = SimpleNamespace(primitives=found, categories={f"item {name}": (name,) for name in of_items})
        return SimpleNamespace(select=lambda kind: dict(sums=results))

    def show(*rows, of_second=categories):
        made = {row_name: row(names, categories) for row_name, names in zip("xyz", rows, strict=False)}
        made |= dict(y=row(rows[1], of_second)) if len(rows) > 1 else {}
        return list(gather_features.primitives(made, "sums", {}))

    null = [show(*(rng.choice(categories, 2, replace=False) for _ in range(3)))[0].p_rows for _ in range(100)]
    true = [show("ab", "ba", "ab")[0] for _ in range(100)]
    print(f"names drawn at random: {sum(p <= LEVEL for p in null)} of 100; the same: {len(true)} of 100")
    assert sum(p <= LEVEL for p in null) <= 8 and all(figure.p_rows <= LEVEL for figure in true)
    two = show("ab", "ba")[:1]
    assert two[0].p_rows is None, "one in ten by chance"
    wanted = [f"y, z; p = {true[0].p_rows:.3f}", "y; not testable", "–"]
    for figures, cell in zip((true[:1], two, show("ab")[:1]), wanted, strict=True):
        table = PrimitiveFigures.table(figures)
        assert dict(zip(table.columns, table.rows[0], strict=True))["Also named in"] == cell
    # The second row's items have two categories alone: names from these are rare in nothing.
    assert show("ab", "ba", "ab", of_second=["a", "b"])[0].p_rows is None


def test_nothing_is_named_where_nothing_was_planted():
    """In 100 worlds; in 100 more there are three groups, each of a category."""
    rates = []
    for planted in (0, 3):
        found = []
        for seed in range(100):
            rows_PxF, categories, _ = make_attributions(100 + seed, planted)
            found.append(find_primitives(rows_PxF, IDS, categories, seed).primitives)
        least = max(planted, 1)
        rates.append(
            [
                sum(len(some) >= least for some in found),
                sum(sum(bool(one.name) for one in some) >= least for some in found),
            ]
        )
    print(f"stable groups, and named ones, in {rates[0]} of 100 null and {rates[1]} of 100 true worlds")
    assert max(rates[0]) <= 8 and min(rates[1]) >= 80


def test_groups_that_have_nothing_to_do_with_categories_have_no_name():
    rows_PxF, categories, _ = make_attributions(3, 1)
    shuffled = [categories[i] for i in np.random.default_rng(0).permutation(len(categories))]
    found = find_primitives(rows_PxF, IDS, shuffled, 0)
    assert found.primitives and not any(one.name for one in found.primitives)
    for alone in ([()] * ITEMS, [("sums",)] * ITEMS):
        found = find_primitives(rows_PxF, IDS, alone, 0)
        assert found.primitives and not any(one.name for one in found.primitives)


@pytest.mark.parametrize(("sizes", "can_name"), [((3, 3), False), ((4, 4), True), ((2, 2, 2), False), ((1, 20), True)])
def test_too_few_items_name_no_group_however_well_it_fits(sizes, can_name):
    """Three of six items in either of two categories: of 20 ways two fit as well as the best, 10 %."""
    categories = np.repeat(np.arange(len(sizes)), sizes)
    rows_PxF = np.random.default_rng(0).normal(0.2, 0.01, (len(categories), 8))
    rows_PxF[:, :4] += 5.0 * (categories == 0)[:, None]
    found = find_primitives(rows_PxF, IDS[: len(categories)], [(f"c{category}",) for category in categories], 0)
    assert found.can_name is can_name
    if not can_name:
        assert not any(one.name for one in found.primitives)
    assert not find_primitives(rows_PxF, IDS[: len(categories)], [()] * len(categories), 0).can_name


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


def make_table(strength, items=20, sets=39, groups=1, control=0.0, seed=1, pool=1000):
    """Groups of additions that lose ``strength`` on them; each has controls there that lose ``control`` and noise."""
    rng = np.random.default_rng(seed)
    prompts, categories = prompts_of(items)
    is_sum_P = np.array(["addition" in some for some in categories.values()])
    edits = [EditDefinition("sums", "clean")]
    for number in range(groups):
        group = f"{GROUP}{number}"
        edits.append(EditDefinition("sums", group, 0, (1, 2, 3 + number)))
        edits.append(EditDefinition("sums", control_group("pool", group), 0, tuple(range(10, 10 + pool))))
        for kind in ("random", "placebo"):
            edits += [EditDefinition("sums", control_group(kind, group), i, (10, 11 + i)) for i in range(sets)]

    def measure(edit):
        noise_P = 0.1 * rng.normal(size=items)
        if edit.group.startswith(GROUP):
            return strength * is_sum_P + noise_P * (strength == control), np.ones(items)
        # Measured on additions alone.
        return np.where(is_sum_P, control + noise_P, np.nan), np.ones(items)

    return table_of(prompts, edits, measure), categories


def judge(table, categories, *groups):
    """Effects of groups, each a category and its features."""
    every = [FeaturePrimitive(name, features, 0.9, 4.0, 0.01, ("sums/00",)) for name, features in groups]
    return judge_primitives(table, "sums", every, categories, 200, 0)


@pytest.mark.parametrize(("strength", "answer"), [(1.0, "yes"), (0.0, "no")])
def test_the_effect_of_a_primitive_on_the_items_of_its_category(strength, answer):
    (found,) = judge(*make_table(strength), ("addition", (1, 2, 3)), ("addition", (1, 2, 4)))
    assert found.items == 10 and found.effect.mean == pytest.approx(strength, abs=0.1)
    assert found.elsewhere.mean == pytest.approx(0.0, abs=0.1) and found.answer == answer
    assert abs(found.random) < 0.1 and abs(found.placebo) < 0.1
    assert (found.sets, found.needed) == (39, 19)
    # The same effect, where controls of its dose have it, too: averaged over all items the group would lose less.
    (found,) = judge(*make_table(strength, control=strength + 1), ("addition", (1, 2, 3)))
    assert found.random == pytest.approx(strength + 1, abs=0.1) and found.answer == "no"
    (found,) = judge(*make_table(strength, pool=19), ("addition", (1, 2, 3)))  # lists that are nearly the same
    assert (found.answer, found.sets, found.random) == ("not testable", 0, None)


def test_a_group_that_makes_answers_likelier_causes_none():
    (found,) = judge(*make_table(-1.0, control=-3.0), ("addition", (1, 2, 3)))
    assert found.effect.mean < 0 and found.p_random == found.p_placebo == 1 / 40 and found.answer == "no"


def test_a_group_does_more_than_its_controls_where_it_does_and_not_elsewhere():
    """100 worlds where a group is a set like its controls, 100 where it costs four of their deviations more."""
    rates = []
    for strength in (0.0, 0.4 / np.sqrt(10)):
        found = [judge(*make_table(strength, sets=19, seed=seed), ("addition", (1, 2, 3)))[0] for seed in range(100)]
        rates.append(sum(one.answer == "yes" for one in found))
    print(f"a group causes its category's answers: yes in {rates[0]} of 100 null and {rates[1]} of 100 true worlds")
    assert rates[0] <= 8 and rates[1] >= 80


@pytest.mark.parametrize(("sets", "tested"), [(5, 0), (18, 0), (19, 1), (38, 1), (39, 2), (59, 3), (79, 4)])
def test_as_many_groups_are_tested_as_the_sets_allow(sets, tested):
    groups = [("addition", (1, 2, 3 + number)) for number in range(4)]
    found = judge(*make_table(1.0, sets=sets, groups=4), *groups)
    assert [one.answer for one in found] == ["yes"] * tested + ["not testable"] * (4 - tested)
    assert [one.needed for one in found] == [20 * tested - 1] * tested + [20 * tested + 19] * (4 - tested)
    assert all((one.p_random is None) == (one.answer == "not testable") for one in found)


def test_groups_have_controls_as_far_as_the_correction_allows():
    assert [count_testable(sets, 99) for sets in (0, 18, 19, 38, 39, 79, 500)] == [0, 0, 1, 1, 2, 4, 4]
    assert count_testable(99, 19) == 1


def test_a_category_without_test_items_does_not_hide_the_others():
    table, categories = make_table(1.0, groups=2)
    (found,) = judge(table, categories, ("division", (1, 2, 3)), ("addition", (1, 2, 4)))
    assert (found.group, found.answer) == (1, "yes")


# Features chosen on one benchmark and ablated on another


def judge_chosen(strength, shuffle=False, seed=0):
    """The effect of features that another benchmark chose (None: drawn as those), and 30 random lists of their dose."""
    rng = np.random.default_rng(seed)
    strength = 0.1 * rng.normal() if strength is None else strength
    prompts, _ = prompts_of(40)
    group, features = CHOSEN_ON + "gsm8k", (50, 51)
    edits = [EditDefinition("sums", "clean"), EditDefinition("sums", "top", 0, (50, 2))]
    edits += [EditDefinition("sums", group, 0, features)]
    edits += [EditDefinition("sums", control_group("random", group), i, (100 + i,)) for i in range(30)]
    size_P = rng.uniform(0.5, 1.5, 40)

    def measure(edit):
        loss = {"top": 2.0, group: strength}.get(edit.group, 0.1 * rng.normal())
        return loss * size_P, size_P

    table = table_of(prompts, edits, measure)
    if shuffle:
        order_N = np.random.default_rng(1).permutation(len(table.value_N))
        names = ("edit_N", "prompt_N", "readout_N", "value_N")
        table = dataclasses.replace(table, **{name: getattr(table, name)[order_N] for name in names})
    (effect,) = judge_domains(table, "sums", 500, 0).values()
    return effect, size_P


def test_an_effect_beyond_random_lists():
    effect, size_P = judge_chosen(1.0)
    assert effect.effect.mean == pytest.approx(size_P.mean()) and effect.effect.low > 0.8
    assert effect.p_value == pytest.approx(1 / 31) and abs(effect.random) < 0.1
    assert (effect.random_sets, effect.common) == (30, 1)
    effect, _ = judge_chosen(0.0)
    assert effect.p_value > 0.05
    assert judge_chosen(0.0, shuffle=True)[0] == effect
    rates = [
        sum(judge_chosen(strength, seed=seed)[0].p_value <= LEVEL for seed in range(100)) for strength in (None, 1.0)
    ]
    print(f"features of another benchmark do more: {rates[0]} of 100 null and {rates[1]} of 100 true worlds")
    assert rates[0] <= 8 and rates[1] >= 80

"""Primitives of a benchmark: planted groups of features are found and named, and none where there are none."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from saejax.interventions import primitives
from saejax.interventions.ablation import FRACTIONS
from saejax.interventions.primitives import (
    GROUP,
    FeaturePrimitive,
    category_contrasts,
    find_primitives,
    judge_primitives,
    recurring,
)
from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition

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
    return rows_PxF, categories.tolist(), groups


@pytest.mark.parametrize("planted", [1, 3])
def test_planted_groups_are_found_and_named(planted):
    rows_PxF, categories, groups = make_attributions(planted, planted)
    found = find_primitives(rows_PxF, IDS, categories, 0)
    named = {one.name: one for one in found.primitives if one.name}
    assert set(named) == set(groups)
    for name, one in named.items():
        assert set(one.features) == set(groups[name].tolist())
        assert one.overlap >= 0.5 and one.p_value <= 0.05
        assert all(categories[IDS.index(item)] == name for item in one.examples)
    again = find_primitives(make_attributions(planted, 1)[0], IDS, categories, 0)
    assert recurring(found.primitives, again.primitives)[0] == (found.primitives[0].name in {"addition"})


def test_nothing_is_named_where_nothing_was_planted():
    found = []
    for seed in range(40):
        rows_PxF, categories, _ = make_attributions(100 + seed, 0)
        found.append(find_primitives(rows_PxF, IDS, categories, seed).primitives)
    assert sum(map(bool, found)) <= 6  # 5 % of 40, and the error of 20 shuffles
    assert sum(any(one.name for one in some) for some in found) <= 2


def test_groups_that_have_nothing_to_do_with_categories_have_no_name():
    rows_PxF, categories, _ = make_attributions(3, 1)
    shuffled = np.random.default_rng(0).permutation(categories).tolist()
    found = find_primitives(rows_PxF, IDS, shuffled, 0)
    assert found.primitives and not any(one.name for one in found.primitives)
    alone = find_primitives(rows_PxF, IDS, [""] * ITEMS, 0)
    assert alone.primitives and not any(one.name for one in alone.primitives)


def test_contrasts_are_those_of_the_t_test_up_to_the_pooled_variance():
    rng = np.random.default_rng(0)
    profile_GxP, category_P = rng.normal(size=(2, 30)), np.repeat(["a", "b", "c"], 10)
    contrast_GxC, p_GxC = category_contrasts(profile_GxP, category_P, 0)
    for g in range(2):
        inside = profile_GxP[g, category_P == "b"], profile_GxP[g, category_P != "b"]
        assert np.sign(contrast_GxC[g, 1]) == np.sign(ttest_ind(*inside).statistic)
        wanted = (inside[0].mean() - inside[1].mean()) / (profile_GxP[g].std(ddof=1) * np.sqrt(1 / 10 + 1 / 20))
        assert contrast_GxC[g, 1] == pytest.approx(wanted)
    assert p_GxC.min() > 0 and p_GxC.max() <= 1


def make_table(strength, items=20, sets=39):
    """A primitive of additions that loses ``strength`` on them; sets lose nothing but noise of 0.1."""
    rng = np.random.default_rng(1)
    prompts = [PromptDefinition(f"sums/{i}", "sums") for i in range(items)]
    categories = {prompt.id: ("addition", "logic")[i % 2] for i, prompt in enumerate(prompts)}
    edits = [EditDefinition("sums", "clean")]
    edits += [EditDefinition("sums", f"{GROUP}0", 0, (1, 2, 3), fraction) for fraction in FRACTIONS]
    edits += [
        EditDefinition("sums", group, i, (10 + 3 * i, 11 + 3 * i))
        for group in ("random", "placebo")
        for i in range(sets)
    ]
    values = []
    for edit in edits:
        is_primitive = edit.group.startswith(GROUP)
        lost_P = [
            (strength * edit.fraction * (categories[prompt.id] == "addition") if is_primitive else 0.1 * rng.normal())
            for prompt in prompts
        ]
        values.append(
            [-5 - np.array(lost_P) * (edit.group != "clean"), np.full(items, edit.fraction * (edit.group != "clean"))]
        )
    block = (edits, prompts, ["answer_log_prob", "change_norm"], np.array(values).transpose(0, 2, 1))
    return EffectsTable.from_blocks(edits, prompts, [block]), categories


@pytest.mark.parametrize(("strength", "answer"), [(1.0, "yes"), (0.0, "no")])
def test_the_effect_of_a_primitive_on_the_items_of_its_category(strength, answer):
    table, categories = make_table(strength)
    one = FeaturePrimitive("addition", (1, 2, 3), 0.9, 4.0, 0.01, ("sums/0",))
    (found,) = judge_primitives(table, "sums", [one, one], categories, 200, 0)
    assert found.items == 10 and found.effect.mean == pytest.approx(strength)
    assert found.elsewhere.mean == pytest.approx(0.0) and found.answer == answer
    assert abs(found.random) < 0.1 and abs(found.placebo) < 0.1


def test_few_control_sets_cannot_answer():
    table, categories = make_table(1.0, sets=5)
    one = FeaturePrimitive("addition", (1, 2, 3), 0.9, 4.0, 0.01, ("sums/0",))
    (found,) = judge_primitives(table, "sums", [one], categories, 200, 0)
    assert found.answer == "not testable"

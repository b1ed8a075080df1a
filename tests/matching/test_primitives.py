"""Which groups may be called after a behaviour: planted ones, and none where nothing is true."""

import dataclasses

import numpy as np

from saejax.interventions.importance import Importance
from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition, merge_tables, save_effects
from saejax.matching.clusters.primitives import BehaviourEffects, costs, primitives, profiles

FEATURES, PROMPTS = 300, 20


def made_effects(seed, planted=(), cost=1.0):
    """Effects of features that fire as often as one another; planted ones cost every prompt more."""
    rng = np.random.default_rng(seed)
    feature = np.arange(0, FEATURES, 1)
    drop_NxP = 0.2 * rng.standard_normal((FEATURES, PROMPTS)) * rng.lognormal(size=(FEATURES, 1))
    drop_NxP[list(planted)] += cost
    columns = {field.name: np.zeros(FEATURES) for field in dataclasses.fields(Importance)}
    columns |= dict(
        feature=feature, firing_rate=rng.uniform(0.01, 0.1, FEATURES), mean_activation=rng.uniform(1, 2, FEATURES),
        drop=drop_NxP.mean(axis=1),
    )  # fmt: skip
    return BehaviourEffects(Importance(**columns), drop_NxP)


def test_a_planted_group_is_called_after_its_behaviour_alone():
    behaviours = dict(sums=made_effects(0, range(6)), years=made_effects(1))
    groups = [range(6), range(50, 56), [7]]
    own, other, single = costs(groups, behaviours, FEATURES, 0)
    assert primitives(own) == ("sums",) and not primitives(other) and not primitives(single)
    odd = behaviours["sums"].drop_NxP[:6, 1::2].mean(axis=1).sum()
    assert abs(own["sums"].drop - odd) < 1e-9 and own["sums"].features == 6
    assert abs(own["sums"].matched_drop) < 1.0 < own["sums"].drop


def test_where_nothing_is_true_p_is_as_small_as_chance_makes_it(monkeypatch):
    """Random groups in 12 worlds: about one in twenty has p at most 0.05."""
    monkeypatch.setattr("saejax.matching.clusters.primitives._DRAWS", 200)
    said = []
    for seed in range(12):
        groups = np.random.default_rng(seed).permutation(FEATURES)[:80].reshape(10, 8)
        found = costs(groups.tolist(), dict(a=made_effects(100 + seed)), FEATURES, seed)
        said += [one["a"].p <= 0.05 for one in found]
    assert len(said) == 120 and np.mean(said) < 0.1


def save_drops(folder, drops):
    """Write effects tables in which every feature of a behaviour is ablated alone."""
    tables = []
    for name, drop_NxP in drops.items():
        edits = [EditDefinition(name, "every", feature, (feature,)) for feature in range(FEATURES)]
        prompts = [PromptDefinition(f"{name}/{number:05d}", name) for number in range(PROMPTS)]
        clean = EditDefinition(name, "clean")
        values = np.concatenate([np.zeros((1, PROMPTS)), -drop_NxP])[:, :, None]
        block = [clean, *edits], prompts, ("logit_diff",), values
        tables.append(EffectsTable.from_blocks([clean, *edits], prompts, [block]))
    save_effects(folder, merge_tables(tables))


def test_profiles_are_of_even_prompts_and_of_all_behaviours(tmp_path):
    """Features that do not fire on a behaviour cost it nothing."""
    one, two = made_effects(2), made_effects(3)
    save_drops(tmp_path, dict(one=one.drop_NxP, two=two.drop_NxP))
    for name, made in dict(one=one, two=two).items():
        made.table.save(tmp_path / f"{name}-importance.parquet")
    loaded = {name: BehaviourEffects.load(tmp_path, name) for name in ("one", "two")}
    feature_F, drop_FxP = profiles(loaded)
    assert feature_F.tolist() == list(range(FEATURES)) and drop_FxP.shape == (FEATURES, PROMPTS)
    even = one.drop_NxP[:, ::2]
    np.testing.assert_allclose(drop_FxP[:, : PROMPTS // 2], even / np.sqrt((even**2).mean()), rtol=1e-5)
    few = Importance(**{name: values[:5] for name, values in two.table.columns.items()})
    _, again = profiles(dict(one=one, two=BehaviourEffects(few, two.drop_NxP[:5])))
    assert not again[5:, PROMPTS // 2 :].any() and again[:5, PROMPTS // 2 :].all()

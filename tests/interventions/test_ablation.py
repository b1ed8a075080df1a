"""What ablation runs and counts, what replaces activations, other kinds and meshes, and what does not fit."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_passes import ablate_sets, draw_falls

from saejax import load_model
from saejax.dictionaries import Dictionary
from saejax.errors import Interrupted, UserError
from saejax.interventions import activity
from saejax.interventions import engine as ablation
from saejax.interventions import split_model as split_module
from saejax.interventions.edits import WORDS, ActivationReplacement, mask
from saejax.interventions.split_model import PROMPTS, SplitModel
from saejax.settings import REPLACEMENTS


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1", dead=5)


@pytest.fixture(scope="module")
def split(tiny, dictionary):
    return SplitModel(tiny, dictionary)


@pytest.fixture(scope="module")
def runs(split, prompts):
    return split.run(prompts)


def draw_sets(rng, features):
    """Return features by themselves, pairs, and large sets."""
    drawn = rng.permutation(features)
    large = [rng.permutation(features)[:20].tolist() for _ in range(2)]
    return [[i] for i in drawn[:12]] + [drawn[k : k + 2].tolist() for k in range(4)] + large


def of_kind(dictionary, kind):
    """A dictionary of another kind with the same directions."""
    arrays, b_enc_F = dictionary.arrays, dictionary.b_enc_F[...]
    arrays_of = dict(jumprelu=dict(threshold_F=jnp.full_like(b_enc_F, 0.2)), gated=dict(r_mag_F=0 * b_enc_F + 0.3))
    if kind == "gated":
        # Magnitudes are 0 where a gate opens: an activation must not jump on the last bit of a pre-activation.
        arrays_of["gated"]["b_mag_F"] = b_enc_F * np.exp(0.3) - 0.05
    config = dataclasses.replace(dictionary.config, kind=kind, k=12 * (kind == "topk"), fires_above=0.5)
    return Dictionary(config, **arrays | arrays_of.get(kind, {}))


@pytest.mark.parametrize("kind", ["linear", "gated", "jumprelu", "topk"])
def test_other_kinds_equal_the_edit_of_a_full_forward_pass(tiny, prompts, dictionary, kind):
    changed, few = of_kind(dictionary, kind), prompts[:4]
    split = SplitModel(tiny, changed)
    features = np.random.default_rng(4).permutation(150)[:40].tolist()
    diffs = ablate_sets(split, split.run(few), [features])
    tokens = tiny.tokenize([prompt.text for prompt in few])
    logits_BxTxV = np.asarray(tiny(tokens, edits=[changed.ablate(features)]).logits_BxTxV)
    for p, prompt in enumerate(few):
        last_V = logits_BxTxV[p, tokens.last_B[p]]
        wanted = last_V[tiny.token_id(prompt.correct)] - last_V[tiny.token_id(prompt.wrong)]
        np.testing.assert_allclose(diffs.ablated_SxP[0, p], wanted, atol=1e-4)
    assert (diffs.drop_SxP != 0).any()


@pytest.mark.parametrize("kind", ["standard", "linear"])
def test_statistics_are_those_of_the_positions_that_change(tiny, prompts, dictionary, kind):
    """A linear feature fires by size, the others above zero."""
    counted = of_kind(dictionary, kind)
    split = SplitModel(tiny, counted)
    runs, rows = split.run(prompts), []
    for run in runs:
        f_BxTxF, domain_BxT = np.asarray(counted.encode(run.value_BxTxD), np.float64), np.asarray(run.domain_BxT)
        rows += [f_BxTxF[p][domain_BxT[p]] for p in range(len(run.index_P))]
    f_NxF = np.concatenate(rows)
    fires_NxF = np.abs(f_NxF) > (0.5 if kind == "linear" else 0.0)
    sum_F = np.where(fires_NxF, np.abs(f_NxF), 0.0).sum(axis=0)
    statistics = activity.statistics(split, runs)
    assert statistics.positions == len(f_NxF)
    np.testing.assert_array_equal(statistics.fires_F, fires_NxF.sum(axis=0))
    np.testing.assert_allclose(statistics.sum_F, sum_F, rtol=1e-5)
    np.testing.assert_allclose(statistics.mean_F, f_NxF.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics.mean_activation_F, sum_F / np.maximum(fires_NxF.sum(axis=0), 1), rtol=1e-5)


def test_what_does_not_fire_has_no_effect_to_the_bit_and_is_not_run(split, runs, dictionary):
    n, prompts = dictionary.config.n_features, sum(len(run.index_P) for run in runs)
    dead = list(range(n - 5, n))
    diffs = ablate_sets(split, runs, [[i] for i in dead] + [dead, []])
    assert diffs.rows == prompts
    assert (diffs.drop_SxP == 0.0).all()
    everything = ablate_sets(split, runs, [[i] for i in range(n)])
    silent_SxP = np.zeros((n, prompts), bool)
    for run in runs:
        f_BxTxF = np.asarray(dictionary.encode(run.value_BxTxD)) * np.asarray(run.domain_BxT)[:, :, None]
        silent_SxP[:, run.index_P] = ~(f_BxTxF > 0).any(axis=1)[: len(run.index_P)].T
    assert 0.1 < silent_SxP.mean() < 0.95
    assert everything.rows == prompts + (~silent_SxP).sum()
    assert (everything.drop_SxP[silent_SxP] == 0.0).all()
    assert (everything.drop_SxP[~silent_SxP] != 0.0).mean() > 0.95


def test_neither_batch_size_nor_mesh_matter(split, runs, dictionary, prompts, tiny_llama):
    sets = draw_sets(np.random.default_rng(5), dictionary.config.n_features)
    wanted = ablate_sets(split, runs, sets, batch_rows=64)
    odd = ablate_sets(split, runs, sets, batch_rows=7)
    over_8 = SplitModel(load_model(str(tiny_llama)), dictionary)
    assert over_8.point.mesh.shape["data"] == 8
    spread = ablate_sets(over_8, over_8.run(prompts), sets, batch_rows=64)
    for again in (odd, spread):
        assert again.rows == wanted.rows
        np.testing.assert_allclose(again.ablated_SxP, wanted.ablated_SxP, atol=1e-5)
        np.testing.assert_allclose(again.clean_P, wanted.clean_P, atol=1e-5)


def test_groups_of_prompts_are_small_and_change_nothing(split, prompts, monkeypatch):
    monkeypatch.setattr(split_module, "GROUP_TOKENS", 20 * PROMPTS)
    runs = split.run(prompts)
    assert len(runs) > 1
    for run in runs:
        rows, length = run.value_BxTxD.shape[:2]
        assert rows % PROMPTS == 0 and 0 <= rows - len(run.index_P) < PROMPTS
        assert rows == PROMPTS or rows * length <= split_module.GROUP_TOKENS
        assert 0 < length - max(run.last_B) <= 2
    sets = draw_sets(np.random.default_rng(6), 100)
    together, apart = (ablate_sets(split, groups, sets) for groups in (runs, split.run(prompts)))
    np.testing.assert_allclose(together.ablated_SxP, apart.ablated_SxP, atol=1e-5)


def test_progress_counts_tokens_and_may_stop(split, runs, dictionary):
    sets, seen = [[i] for i in range(dictionary.config.n_features)], []
    ablate_sets(split, runs, sets, 32, lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, seen[-1][0]) and {total for _, total in seen} == {seen[-1][0]}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})

    def stop(done, total):
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        ablate_sets(split, runs, sets, 32, stop)


def test_changes_that_may_be_rounding_are_taken_for_none(split, runs, dictionary):
    edits = mask(split.dictionary, [[i] for i in range(dictionary.config.n_features)], 1e-6)
    exact, snapped = (
        ablation.run_edits(split, runs, edits, snap_rounding=snaps)["logit_diff"] for snaps in (False, True)
    )
    changed = exact != snapped
    assert changed.any() and (snapped[0] == exact[0]).all()
    np.testing.assert_array_equal(snapped[changed], np.broadcast_to(exact[0], exact.shape)[changed])
    assert np.abs(exact - exact[0])[changed].max() < 1e-4


def test_nan_in_the_dictionary(tiny, prompts, dictionary, split, runs):
    def with_value(name, feature, value):
        arrays = dictionary.arrays | {name: dictionary.arrays[name].at[feature].set(value)}
        return SplitModel(tiny, Dictionary(dictionary.config, **arrays))

    broken = with_value("b_enc_F", 7, jnp.nan)
    with pytest.raises(UserError, match="feature 7 has an activation that is not finite"):
        activity.statistics(broken, broken.run(prompts))
    fires = int(np.argmax(activity.statistics(split, runs).fires_F))
    broken = with_value("W_dec_FxD", fires, jnp.inf)
    with pytest.raises(UserError, match="logit difference after an edit at resid_post.1 is not finite"):
        ablate_sets(broken, broken.run(prompts), [[fires]])


def test_nan_in_the_model_names_the_prompt(tiny, prompts, dictionary):
    broken = SplitModel(tiny, dictionary)
    war = int(tiny.tokenize([prompts[4].text]).ids_BxT[0, 1])
    assert war not in tiny.tokenize([prompts[5].text]).ids_BxT
    broken.params = {**tiny.params, "embed_VxD": tiny.params["embed_VxD"].at[war].set(jnp.nan)}
    with pytest.raises(UserError, match=r"resid_post\.1 is not finite in the prompt 'The war"):
        broken.run([prompts[5], prompts[4]])


def test_a_dictionary_of_another_model_site_or_width(tiny, dictionary):
    narrow = Dictionary.initial(dataclasses.replace(dictionary.config, d_in=63), jax.random.key(0))
    for misfit, message in (
        (
            dictionary.with_config(dataclasses.replace(dictionary.config, fingerprint="0" * 16)),
            "use the model it was trained on",
        ),
        (dictionary.with_config(dataclasses.replace(dictionary.config, site="resid_post.4")), "no site resid_post.4"),
        (narrow, "reads 63 dimensions, but resid_post.1 has 64"),
    ):
        with pytest.raises(UserError, match=message):
            SplitModel(tiny, misfit)


def test_in_bfloat16_the_effects_are_nearly_the_same(tiny_llama, one_device, prompts, dictionary, split, runs):
    half = SplitModel(load_model(str(tiny_llama), dtype="bfloat16", mesh=one_device), dictionary)
    sets = [list(range(0, dictionary.config.n_features, 2))]
    wanted_P = ablate_sets(split, runs, sets).drop_SxP[0]
    drop_P = ablate_sets(half, half.run(prompts), sets).drop_SxP[0]
    assert np.corrcoef(drop_P, wanted_P)[0, 1] > 0.9
    assert jax.tree.leaves(half.params)[0].dtype == jnp.bfloat16


@pytest.mark.usefixtures("cold_programs")
def test_few_programs(split, runs, dictionary):
    before = ablation.run_rows._cache_size()
    n = dictionary.config.n_features
    ablate_sets(split, runs, [[i] for i in range(n)] + [list(range(n))], batch_rows=48)
    assert ablation.run_rows._cache_size() - before <= 6


SETS = [[3], [40], [7, 90, 120], list(range(0, 160, 2))]


def draws(seed):
    return ActivationReplacement("random", seed=np.uint32(seed))


def activations(dictionary, run):
    """f [B, T, F] of a clean run, 0 outside the domain, in fp64."""
    f_BxTxF = np.asarray(dictionary.encode(run.value_BxTxD), np.float64)
    return f_BxTxF * np.asarray(run.domain_BxT)[:, :, None]


def test_every_kind_is_described():
    assert tuple(WORDS) == REPLACEMENTS


def test_a_prefix_is_shared_where_that_of_the_counterpart_is_too():
    prefix_PxT, second_PxT = np.array([[0, 1, 1], [0, 2, 2], [0, 1, 0]]), np.array([[0, 0, 2], [2, 0, 0], [0, 0, 2]])
    second = types.SimpleNamespace(prefix_PxT=second_PxT)
    run = types.SimpleNamespace(prefix_PxT=prefix_PxT, last_B=np.zeros(3), counterpart=second)
    shared_PxT = ablation.EditedRun(run, ActivationReplacement("counterpart")).prompts.prefix_PxT
    pairs = list(zip(prefix_PxT.ravel().tolist(), second_PxT.ravel().tolist(), strict=True))
    for a, first in zip(shared_PxT.ravel(), pairs, strict=True):
        assert [a == b for b in shared_PxT.ravel()] == [first == second for second in pairs]
    # Draws differ from prompt to prompt, so nothing is shared.
    drawn_PxT = ablation.EditedRun(run, draws(3)).prompts.prefix_PxT
    assert len(np.unique(drawn_PxT)) == drawn_PxT.size


def test_the_same_prompt_as_counterpart_changes_nothing_and_is_not_run(split, pairs):
    (run,) = split.run(pairs)
    paired = dataclasses.replace(run, counterpart=run)
    diffs = ablate_sets(split, [paired], SETS, source=ActivationReplacement("counterpart"))
    assert (diffs.drop_SxP == 0).all() and diffs.rows == len(pairs)


def test_draws_are_activations_at_other_positions(split, dictionary, pairs):
    (run,) = split.run(pairs)
    f_BxTxF = activations(dictionary, run)[: len(run.index_P)]
    features_K = np.arange(f_BxTxF.shape[2])
    fall_BxTxK = draw_falls(split, run, draws(7), features_K)
    kept_BxTxK = f_BxTxF - fall_BxTxK
    moved = 0
    for feature in features_K:
        before, drawn = f_BxTxF[:, :, feature], kept_BxTxK[:, :, feature]
        fires = before != 0
        assert (drawn[~fires] == 0).all()
        values = before[fires]
        for value, at in zip(drawn[fires], values, strict=True):
            assert np.isclose(value, values, atol=1e-5).any()
            if len(values) > 1 and np.isclose(values, at, atol=1e-5).sum() == 1:
                assert not np.isclose(value, at, atol=1e-6)
                moved += 1
    assert moved > 300
    # Draws do not depend on what else is gathered, and others come with another seed.
    some = features_K[30:50]
    again = draw_falls(split, run, draws(7), some)
    np.testing.assert_allclose(again, fall_BxTxK[:, :, some], atol=1e-6)
    assert np.abs(draw_falls(split, run, draws(8), some) - again).max() > 0.1


def test_every_other_position_is_drawn_as_often(split, dictionary, prompts):
    (run,) = split.run(prompts[:11])
    f_BxTxF = activations(dictionary, run)[: len(run.index_P)]
    feature = int(np.argmax((f_BxTxF != 0).sum((0, 1)) == 6))
    values = f_BxTxF[:, :, feature][f_BxTxF[:, :, feature] != 0]
    assert len(values) == 6
    drawn = []
    for seed in range(150):
        kept = f_BxTxF[:, :, feature] - draw_falls(split, run, draws(seed), np.array([feature]))[:, :, 0]
        drawn.append(kept[f_BxTxF[:, :, feature] != 0])
    counts = np.array([np.isclose(np.concatenate(drawn), value, atol=1e-5).sum() for value in values])
    assert counts.sum() >= 900 and counts.min() > 0.7 * 150 and counts.max() < 1.3 * 150


def test_two_clean_runs_of_the_same_prompts_are_replaced_differently(split, pairs):
    (run,) = split.run(pairs)
    again = dataclasses.replace(run, index_P=run.index_P + len(pairs))
    diffs = ablate_sets(split, [run, again], SETS, source=draws(3))
    first_SxP, second_SxP = np.split(diffs.drop_SxP, 2, axis=1)
    assert np.abs(first_SxP - second_SxP).max() > 0.01


def test_a_feature_that_fires_once_stays():
    f_BxTxK = jnp.zeros((2, 3, 2)).at[0, 1, 0].set(2.0).at[:, 2, 1].set(jnp.array([1.0, 5.0]))

    def removed(rows):
        return draws(0).removed(f_BxTxK, f_BxTxK, jnp.ones((2, 3), bool), jnp.arange(2), jnp.int32(rows))

    assert (removed(2)[:, :, 0] == 0).all()
    np.testing.assert_array_equal(removed(2)[:, 2, 1], [-4.0, 4.0])  # the two change places
    assert (removed(1)[0] == 0).all()  # the second row is a copy that does not count


def test_a_counterpart_of_another_length_is_refused(split, pairs):
    longer = dataclasses.replace(pairs[0], counterpart=pairs[0].text + " and so on")
    with pytest.raises(UserError, match="takes pairs of one length"):
        split.run([*pairs[1:3], longer], counterparts=True)

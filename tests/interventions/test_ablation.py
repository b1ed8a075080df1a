"""What ablation runs and counts, dictionaries of other kinds, meshes, and what is not finite or does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_passes import ablate_sets

from saejax import load_model
from saejax.dictionaries import Dictionary
from saejax.errors import Interrupted, UserError
from saejax.interventions import activity
from saejax.interventions import engine as ablation
from saejax.interventions import split_model as split_module
from saejax.interventions.edits import mask
from saejax.interventions.split_model import ROW_STEP, SplitModel


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
    # Another program rounds otherwise: one of the hundred thousand may lie on the other side of its threshold.
    assert np.abs(statistics.fires_F - fires_NxF.sum(axis=0)).sum() <= 1
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
    monkeypatch.setattr(split_module, "GROUP_TOKENS", 20 * ROW_STEP)
    runs = split.run(prompts)
    assert len(runs) > 1
    for run in runs:
        rows, length = run.value_BxTxD.shape[:2]
        assert rows % ROW_STEP == 0 and 0 <= rows - len(run.index_P) < ROW_STEP
        assert rows == ROW_STEP or rows * length <= split_module.GROUP_TOKENS
        assert 0 < length - max(run.last_B) <= 2
    sets = draw_sets(np.random.default_rng(6), 100)
    together, apart = (ablate_sets(split, groups, sets) for groups in (runs, split.run(prompts)))
    np.testing.assert_allclose(together.ablated_SxP, apart.ablated_SxP, atol=1e-5)


def test_progress_counts_rows_and_may_stop(split, runs, dictionary):
    sets, seen = [[i] for i in range(dictionary.config.n_features)], []
    ablate_sets(split, runs, sets, 32, lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, seen[-1][0]) and {total for _, total in seen} == {seen[-1][0]}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == (1 + len(sets)) * sum(len(run.index_P) for run in runs)

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
    with pytest.raises(
        UserError, match="logit difference, or its gradient, is not finite after an edit at resid_post.1"
    ):
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

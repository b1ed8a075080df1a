"""Edits through the engine, against full passes in PyTorch and in JAX; slopes and attributions of any target."""

import dataclasses

import numpy as np
import pytest
from full_passes import effects_by_full_passes

from saejax import load_model
from saejax.errors import UserError
from saejax.interventions import edits, engine, slopes
from saejax.interventions.edits import ActivationReplacement
from saejax.interventions.split_model import SplitModel
from saejax.tasks.likelihood import encode_pair, loglikelihoods

SETS = [[3], [8, 20, 51], [90, 4], []]
READOUTS = ("logit_diff", "log_prob", "top1", "kl", "change_norm")


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def few(prompts):
    return prompts[:6]


def make_edits(dictionary) -> dict[str, edits.FeatureEdits]:
    mean_F = np.linspace(0.0, 1.0, dictionary.config.n_features, dtype=np.float32)
    return dict(
        mask=edits.mask(dictionary, SETS),
        part=edits.mask(dictionary, SETS, 0.3),
        mean=edits.mask(dictionary, SETS, 1.0, ActivationReplacement("mean", mean_F=mean_F)),
        scale=edits.scale(dictionary, SETS, [2.0, 0.5, -1.0, 1.0]),
        set_to=edits.set_to(dictionary, SETS, 0.7),
        add=edits.add(dictionary, SETS, 0.4),
        swap=edits.swap(dictionary, SETS),
        project=edits.project("resid_post.1", np.random.default_rng(0).normal(size=(2, 3, 64))),
    )


@pytest.mark.parametrize("kind", ["mask", "part", "mean", "scale", "set_to", "add", "swap", "project"])
def test_every_edit_equals_full_passes(tiny, few, dictionary, kind):
    batch = make_edits(dictionary)[kind]
    got = engine.effects(tiny, few, batch, READOUTS)
    want = effects_by_full_passes(tiny, few, batch, READOUTS)
    np.testing.assert_allclose(got, want, atol=3e-5)
    if kind == "swap":
        assert np.abs(got[:, :, -1]).max() == 0.0  # these prompts are their own counterparts
    else:
        assert np.abs(got[0, :, -1]).max() > 0.1


@pytest.mark.parametrize("positions", ["last", "1:4"])
@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("kind", ["part", "add"])
def test_positions_and_the_error_term_equal_full_passes(tiny, few, dictionary, positions, error, kind):
    batch = make_edits(dictionary)[kind]
    got = engine.effects(tiny, few, batch, READOUTS, positions, error)
    np.testing.assert_allclose(got, effects_by_full_passes(tiny, few, batch, READOUTS, positions, error), atol=3e-5)


@pytest.mark.parametrize("kind", ["set_to", "add", "part"])
def test_edits_equal_a_torch_hook(tiny, few, dictionary, plain, kind):
    import torch

    batch = make_edits(dictionary)[kind]
    got_ExP = engine.effects(tiny, few, batch)[:, :, 0]
    W_dec_FxD = np.asarray(dictionary.W_dec_FxD[...], np.float64)
    for p in range(0, len(few), 2):
        run = plain(dictionary, few[p])
        for e, members in enumerate(SETS):

            def change(x_1xTxD, run=run, members=members):
                x_TxD = x_1xTxD[0].numpy()
                f_TxK = run.features(x_TxD)[:, members]
                usable_Tx1 = (np.linalg.norm(x_TxD, axis=1) <= dictionary.config.max_norm)[:, None]
                after = dict(set_to=0.7 + 0 * f_TxK, add=f_TxK + 0.4, part=0.7 * f_TxK)[kind]
                return x_1xTxD + torch.from_numpy(usable_Tx1 * (after - f_TxK) @ W_dec_FxD[members])[None]

            with torch.no_grad():
                np.testing.assert_allclose(got_ExP[e, p], float(run.run(change)), atol=1e-4)


def test_resampled_activations_come_from_other_positions(tiny, few, dictionary):
    got = engine.effects(tiny, few, edits.resample(dictionary, SETS), ("logit_diff", "change_norm"))
    again = engine.effects(tiny, few, edits.resample(dictionary, SETS), ("logit_diff", "change_norm"))
    other = engine.effects(tiny, few, edits.resample(dictionary, SETS, seed=5), ("logit_diff", "change_norm"))
    np.testing.assert_array_equal(got, again)
    assert np.abs(got - other).max() > 1e-3 and np.abs(got[-1, :, 1]).max() == 0.0


def test_what_is_added_on_eight_devices_is_what_is_added_on_one(tiny, tiny_llama, few, dictionary):
    over_8, batch = load_model(str(tiny_llama)), make_edits(dictionary)["add"]
    assert over_8.mesh.shape["data"] == 8
    got = engine.effects(over_8, few, batch, READOUTS)
    np.testing.assert_allclose(got, engine.effects(tiny, few, batch, READOUTS), atol=2e-5)


def test_a_set_with_a_feature_twice_or_out_of_range_is_refused(dictionary):
    with pytest.raises(UserError, match="twice"):
        edits.mask(dictionary, [[1, 1]])
    with pytest.raises(UserError, match="does not exist"):
        edits.mask(dictionary, [[10_000]])


def test_slopes_equal_autograd_in_torch(tiny, few, dictionary, plain):
    slope_PxTxD = slopes.slopes(tiny, few, "logit_diff", "resid_post.1")
    for p, prompt in enumerate(few):
        want_TxD = plain(dictionary, prompt).slopes()
        np.testing.assert_allclose(slope_PxTxD[p, : len(want_TxD)], want_TxD, atol=1e-4)
        assert (slope_PxTxD[p, len(want_TxD) :] == 0).all()


def test_attribution_of_a_target_equals_that_of_answers(tiny, prompts, dictionary):
    """For prompts that all have the same two answers, these are a target like any other."""
    alike = [prompt for prompt in prompts if (prompt.correct, prompt.wrong) == (prompts[1].correct, prompts[1].wrong)]
    split = SplitModel(tiny, dictionary)
    runs = split.run(alike)
    targets_Rx2 = np.array([[5, 9], [tiny.token_id(alike[0].correct), tiny.token_id(alike[0].wrong)], [9, 5]])
    got_RxF, again_RxF = slopes.target_attributions([split, split], [runs, runs], targets_Rx2)
    np.testing.assert_array_equal(got_RxF, again_RxF)
    want_F = slopes.attribution(split, runs).mean(axis=0)
    np.testing.assert_allclose(got_RxF[1], want_F, atol=1e-5)
    np.testing.assert_allclose(got_RxF[0], -got_RxF[2], atol=1e-5)
    assert np.abs(got_RxF[0]).max() > 1e-3


def test_whole_answers_and_cross_entropy_equal_full_passes(tiny, few, dictionary):
    batch = edits.mask(dictionary, SETS)
    got = engine.effects(tiny, few, batch, ("answer_log_prob", "ce", "logit_diff"))
    np.testing.assert_array_equal(got[:, :, 2], engine.effects(tiny, few, batch)[:, :, 0])
    np.testing.assert_array_equal(got[:, :, :2], engine.effects(tiny, few, batch, ("answer_log_prob", "ce")))
    pairs = [encode_pair(tiny.tokenizer, prompt.text, prompt.correct + " and on") for prompt in few]
    longer = [dataclasses.replace(prompt, correct=prompt.correct + " and on") for prompt in few]
    whole = engine.effects(tiny, longer, batch, ("answer_log_prob",))[:, :, 0]
    for e, members in enumerate(SETS):
        changes = [dictionary.ablate(members)] if members else []
        totals = [scored.total for scored in loglikelihoods(tiny, *zip(*pairs, strict=True), changes)]
        np.testing.assert_allclose(whole[e], totals, atol=2e-4)
        for p, prompt in enumerate(few):
            tokens = tiny.tokenize([prompt.text])
            logits_TxV = np.asarray(tiny(tokens, edits=changes).logits_BxTxV[0], np.float64)
            logp_TxV = logits_TxV - np.logaddexp.reduce(logits_TxV, axis=1, keepdims=True)
            ids_T = tokens.ids_BxT[0]
            ce = -logp_TxV[np.arange(len(ids_T) - 1), ids_T[1:]].mean()
            assert got[e, p, 1] == pytest.approx(ce, abs=1e-4)
    with pytest.raises(UserError, match="edits at all positions"):
        engine.effects(tiny, few, batch, ("ce",), positions="last")

"""Activation x gradient of every feature, against PyTorch's autograd and against the effects it estimates."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions import slopes as screening
from saejax.interventions.edits import ActivationReplacement
from saejax.interventions.split_model import SplitModel
from saejax.models import language_model
from saejax.models.config import RunRules


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_in.1"])
def test_attribution_equals_torch_autograd(tiny, prompts, make_dictionary, plain, site):
    dictionary = make_dictionary(site)
    split = SplitModel(tiny, dictionary)
    few = prompts[:12]
    attribution_NxF = screening.attribution(split, split.run(few))
    assert attribution_NxF.shape == (len(few), dictionary.config.n_features)
    for p in range(0, len(few), 2):
        wanted_F = plain(dictionary, few[p]).attribution()
        assert np.abs(wanted_F).max() > 0.01
        np.testing.assert_allclose(attribution_NxF[p], wanted_F, atol=1e-4 * np.abs(wanted_F).max())


def test_with_counterparts_their_activations_stand_in(tiny, prompts, make_dictionary, plain):
    dictionary = make_dictionary("resid_post.1")
    split = SplitModel(tiny, dictionary)
    lengths = tiny.tokenize([prompt.text for prompt in prompts]).lengths_B.tolist()
    others = {length: prompt for length, prompt in zip(lengths, prompts, strict=True)}  # the last of each length
    few = [dataclasses.replace(p, counterpart=others[n].text) for n, p in zip(lengths[:6], prompts, strict=False)]
    runs = split.run(few), split.run_counterparts(few)
    attribution_NxF = screening.attribution(split, runs[0], ActivationReplacement("counterpart"), runs[1])
    for p in range(0, len(few), 2):
        other = plain(dictionary, dataclasses.replace(few[p], text=few[p].counterpart))
        wanted_F = plain(dictionary, few[p]).attribution(other)
        assert np.abs(wanted_F).max() > 0.01
        np.testing.assert_allclose(attribution_NxF[p], wanted_F, atol=1e-4 * np.abs(wanted_F).max())
    same_NxF = screening.attribution(split, runs[0], ActivationReplacement("counterpart"), runs[0])
    assert (same_NxF == 0).all()


@pytest.mark.parametrize("kind", ["mean", "random"])
def test_the_ranking_follows_the_replacement(tiny, prompts, make_dictionary, plain, kind):
    """(f - g) x gradient: of means g at every position that is read, of random draws their mean where f is not 0."""
    dictionary = make_dictionary("resid_post.1")
    split, few = SplitModel(tiny, dictionary), prompts[:12]
    (run,) = split.run(few)
    values = [plain(dictionary, prompt) for prompt in few]
    # As the model computes them: what is nearly 0 there may be 0 in fp64, and is then not drawn.
    place_P = np.argsort(run.index_P)
    read_PxT = np.asarray(run.domain_BxT)[place_P]
    f_PxTxF = np.asarray(dictionary.encode(run.read_BxTxD), np.float64)[place_P] * read_PxT[:, :, None]
    f_NxF = f_PxTxF[read_PxT]
    fires_F = (f_NxF != 0).sum(axis=0)
    mean_F = f_NxF.mean(axis=0)
    source = ActivationReplacement("mean", mean_F=mean_F) if kind == "mean" else ActivationReplacement("random", seed=3)
    attribution_NxF = screening.attribution(split, [run], source)
    for p in range(0, len(few), 3):
        gradient_TxF = values[p].slopes() @ np.asarray(dictionary.W_dec_FxD[...], np.float64).T
        f_TxF, read_Tx1 = f_PxTxF[p, : len(gradient_TxF)], read_PxT[p, : len(gradient_TxF), None]
        if kind == "mean":
            fall_TxF = (f_TxF - mean_F) * read_Tx1
        else:
            others_TxF = (f_NxF.sum(axis=0) - f_TxF) / np.maximum(fires_F - 1, 1)
            fall_TxF = np.where((f_TxF != 0) & (fires_F > 1), f_TxF - others_TxF, 0.0)
        wanted_F = (fall_TxF * gradient_TxF).sum(axis=0)
        np.testing.assert_allclose(attribution_NxF[p], wanted_F, atol=2e-4 * np.abs(wanted_F).max())
        assert np.abs(wanted_F - (f_TxF * gradient_TxF).sum(axis=0)).max() > 0.05 * np.abs(wanted_F).max()


def test_attribution_is_the_slope_of_the_effect(tiny, prompts, make_dictionary, plain):
    # Central difference of the plain run, whose norms are in fp32: x -> x - s f_i W_dec_i at s = 0.
    dictionary = make_dictionary("resid_post.1")
    split = SplitModel(tiny, dictionary)
    attribution_NxF = screening.attribution(split, split.run(prompts[:12]))
    W_dec_FxD = np.asarray(dictionary.W_dec_FxD[...], np.float64)
    for p in range(3):
        run = plain(dictionary, prompts[p])
        for feature in np.argsort(-np.abs(attribution_NxF[p]))[:3]:

            def without(share, feature=feature, run=run):
                def change(x_1xTxD):
                    f_T = run.features(x_1xTxD[0].detach().numpy())[:, feature]
                    return x_1xTxD - x_1xTxD.new_tensor(share * np.outer(f_T, W_dec_FxD[feature]))[None]

                return float(run.run(change).detach())

            slope = -(without(3e-3) - without(-3e-3)) / 6e-3
            np.testing.assert_allclose(attribution_NxF[p, feature], slope, rtol=2e-3)


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_in.1", "attn_out.2"])
def test_relevance_goes_by_its_rules(tiny, prompts, make_dictionary, plain, site):
    dictionary = make_dictionary(site)
    split = SplitModel(tiny, dictionary)
    few = prompts[:12]
    gradient_NxF = screening.attribution(split, split.run(few))
    split.point = dataclasses.replace(split.point, rules=RunRules(backward="relp"))
    relevance_NxF = screening.attribution(split, split.run(few))
    for p in range(0, len(few), 4):
        run = plain(dictionary, few[p])
        with run.relevance_rules():
            wanted_F = run.attribution()
        np.testing.assert_allclose(relevance_NxF[p], wanted_F, atol=1e-4 * np.abs(wanted_F).max())
        assert np.abs(gradient_NxF[p] - wanted_F).max() > 0.05 * np.abs(wanted_F).max()


def test_the_rules_change_no_value(tiny):
    tokens = tiny.tokenize(["The cat near the dogs"])
    fixed = tiny.config, (), True, tiny.params, tokens.ids_BxT, tokens.lengths_B
    plain, again = (language_model.forward(*fixed, rules=rules)[0] for rules in (RunRules(), RunRules(backward="relp")))
    np.testing.assert_allclose(again, plain, atol=2e-6 * np.abs(plain).max())


def test_leaders_are_positive_and_in_order():
    attribution_F = np.array([0.1, -3.0, 0.5, 0.0, 0.2])
    assert screening.leaders(attribution_F, 2) == [2, 4]
    assert screening.leaders(attribution_F, 5) == [2, 4, 0]
    assert screening.leaders(-np.abs(attribution_F), 3) == []


def test_a_gradient_that_is_not_finite(tiny, prompts, make_dictionary):
    dictionary = make_dictionary("resid_post.1")
    arrays = dictionary.arrays
    arrays["W_dec_FxD"] = arrays["W_dec_FxD"].at[3].set(jnp.nan)
    split = SplitModel(tiny, Dictionary(dictionary.config, **arrays))
    with pytest.raises(UserError, match="gradient .* resid_post.1 is not finite"):
        screening.attribution(split, split.run(prompts))

"""Activation x gradient of every feature, against PyTorch's autograd and against the effects it estimates."""

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.causal import screening
from saejax.causal.split import SplitModel
from saejax.dictionaries import Dictionary
from saejax.errors import UserError


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

"""The logit lens, compared with the model's own logits and with the formula."""

import jax
import numpy as np
import pytest

from saejax import load_model
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.tokens import pad


def test_the_logit_lens_reads_what_the_formula_says(tiny_llama, one_device):
    lm = load_model(str(tiny_llama), mesh=one_device)
    rng = np.random.default_rng(0)
    prompts = pad([rng.integers(1, 300, length).tolist() for length in (9, 6, 4)])
    layers = lm.config.n_layers
    full = lm(prompts, capture=[f"resid_post.{layer}" for layer in range(layers)])
    final = jax.nn.log_softmax(full.logits_BxTxV)
    reading = lm.lens(prompts, answers=[7, 11], top=3)
    for layer in range(layers):
        x_BxTxD = full.sites[f"resid_post.{layer}"]
        logp = np.asarray(jax.nn.log_softmax(decoder.unembed(lm.config, lm.params, x_BxTxD)))
        np.testing.assert_allclose(lm.unembed(x_BxTxD), decoder.unembed(lm.config, lm.params, x_BxTxD), atol=1e-5)
        np.testing.assert_allclose(reading.answer_logp_LxBxTxN[layer], logp[..., [7, 11]], atol=2e-4)
        # Another program rounds otherwise: tokens that are as likely to 1e-4 may stand on either side.
        least, most = ((logp > logp[..., 7:8] + by).sum(-1) for by in (1e-4, -1e-4))
        rank = np.asarray(reading.answer_rank_LxBxTxN[layer, ..., 0])
        assert (least <= rank).all() and (rank < most).all() and (most - least).mean() < 1.1
        np.testing.assert_allclose(reading.logp_LxBxTxC[layer], -np.sort(-logp)[..., :3], atol=2e-4)
        kl = (np.exp(final) * (final - logp)).sum(-1)
        np.testing.assert_allclose(reading.kl_LxBxT[layer], kl, atol=2e-3)
    assert np.abs(reading.kl_LxBxT[-1]).max() < 1e-4  # the last layer reads as the model's own distribution
    assert reading.control.kl_LxBxT[-1].mean() > 0.5  # and a rotated stream does not
    logits = np.asarray(full.logits_BxTxV)
    chosen = np.take_along_axis(logits, np.asarray(reading.ids_LxBxTxC[-1, ..., :1]), -1)[..., 0]
    np.testing.assert_allclose(chosen, logits.max(-1), atol=1e-4)
    # A layer's Jacobian comes before the norm; the others are read as they are.
    jacobian_DxD = rng.standard_normal((lm.config.d_model, lm.config.d_model)).astype(np.float32)
    carried = lm.lens(prompts, answers=[7, 11], top=3, jacobians={1: jacobian_DxD})
    x_BxTxD = np.asarray(full.sites["resid_post.1"], np.float64) @ jacobian_DxD.T.astype(np.float64)
    logp = np.asarray(jax.nn.log_softmax(lm.unembed(x_BxTxD.astype(np.float32))))
    np.testing.assert_allclose(carried.answer_logp_LxBxTxN[1], logp[..., [7, 11]], atol=2e-4)
    for layer in {*range(layers)} - {1}:
        np.testing.assert_allclose(carried.kl_LxBxT[layer], reading.kl_LxBxT[layer], atol=1e-5)


def test_answers_that_are_no_ids_are_refused(tiny_llama, one_device):
    lm = load_model(str(tiny_llama), mesh=one_device)
    for options, message in (
        (dict(answers="Paris"), "answers has 'Paris': expected ids of tokens, 0 to 383, as lm.token_id returns them"),
        (dict(answers=[7, 384]), "answers has 384: "),
        (dict(answers=[-1]), "answers has -1: "),
        (dict(answers=[7, True]), r"answers has \[7, True\]: "),
        (dict(top=0), "top is 0: expected a whole number, 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            lm.lens(pad([[1, 2, 3]]), **options)

"""The logit and Jacobian lenses, beside dense Jacobians and the model's own logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import fit_lens, load_lens, load_model
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.decoder import run_layers
from saejax.models.language_model import LanguageModel
from saejax.models.lens import JacobianLens
from saejax.models.lens_files import save_lens
from saejax.models.tokens import pad

SKIP = 2


@pytest.fixture(scope="module")
def lm(tiny_llama, one_device):
    return load_model(str(tiny_llama), mesh=one_device)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return pad([rng.integers(1, 300, length).tolist() for length in (9, 6, 4)])


def dense_mean(lm, prompts):
    """The definition, by the whole Jacobian of the layers after each one."""
    found = []
    for row, length in zip(prompts.ids_BxT, prompts.lengths_B, strict=True):
        x_1xTxD = decoder.embed(lm.config, lm.params, row[None, :length])
        valid = slice(SKIP, length - 1)
        maps = []
        for layer in range(lm.config.n_layers - 1):
            run = lambda x, first, stop: run_layers(lm.config, lm.params, x, first, stop).x  # noqa: E731
            at_1xTxD = run(x_1xTxD, 0, layer + 1)
            jacobian = jax.jacrev(lambda x: run(x, layer + 1, lm.config.n_layers)[0])(at_1xTxD)[:, :, 0]  # noqa: B023
            maps.append(np.asarray(jacobian)[valid, :, valid].sum(0).mean(1))
        found.append(maps)
    return np.mean(found, axis=0)


def test_the_jacobian_lens_is_the_mean_of_dense_jacobians(lm, prompts, tmp_path):
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(value), jnp.float64) for name, value in lm.params.items()}
        exact = LanguageModel(lm.config, wide, lm.tokenizer, lm.source, lm.mesh, lm.rules)
        lens = fit_lens(exact, prompts, tmp_path / "lens.pt", skip=SKIP)
        wanted = dense_mean(exact, prompts)
    assert lens.maps_LxDxD.dtype == np.float64 and lens.n_prompts == 3
    np.testing.assert_allclose(lens.maps_LxDxD, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    kept = load_lens(tmp_path / "lens.pt")
    np.testing.assert_allclose(kept.maps_LxDxD, wanted, rtol=1e-3, atol=1e-4)


def test_a_fit_that_was_stopped_goes_on(lm, prompts, tmp_path):
    whole = fit_lens(lm, prompts, tmp_path / "whole.pt", skip=SKIP)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_lens(lm, prompts, tmp_path / "lens.pt", skip=SKIP, on_progress=stop)
    with pytest.raises(UserError, match="delete it"):
        fit_lens(lm, prompts, tmp_path / "lens.pt", skip=0)
    seen = []
    parts = fit_lens(lm, prompts, tmp_path / "lens.pt", skip=SKIP, on_progress=lambda done, _: seen.append(done))
    assert seen == [2, 3] and sorted(path.name for path in tmp_path.iterdir()) == ["lens.pt", "whole.pt"]
    np.testing.assert_array_equal(parts.maps_LxDxD, whole.maps_LxDxD)
    with pytest.raises(UserError, match="exists already"):
        fit_lens(lm, prompts, tmp_path / "lens.pt", skip=SKIP)
    with pytest.raises(UserError, match="4 tokens is too short"):
        fit_lens(lm, prompts, tmp_path / "other.pt", skip=3)


def test_lenses_read_what_the_formula_says(lm, prompts):
    layers, width = lm.config.n_layers, lm.config.d_model
    maps = 0.3 * np.random.default_rng(1).standard_normal((layers - 1, width, width)).astype(np.float32)
    full = lm(prompts, capture=[f"resid_post.{layer}" for layer in range(layers)])
    final = jax.nn.log_softmax(full.logits_BxTxV)
    for jacobian in (None, JacobianLens(maps, 1)):
        read = lm.lens(prompts, jacobian, answers=[7, 11], top=3)
        for layer in range(layers):
            x_BxTxD = full.sites[f"resid_post.{layer}"]
            if jacobian is not None and layer < layers - 1:
                x_BxTxD = jnp.matmul(x_BxTxD, maps[layer].T, precision="highest")
            logp = np.asarray(jax.nn.log_softmax(decoder.unembed(lm.config, lm.params, x_BxTxD)))
            np.testing.assert_allclose(read.answer_logp_LxBxTxN[layer], logp[..., [7, 11]], atol=2e-4)
            np.testing.assert_array_equal(
                read.answer_rank_LxBxTxN[layer, ..., 0], (logp > logp[..., 7:8]).sum(-1), strict=False
            )
            np.testing.assert_allclose(read.logp_LxBxTxC[layer], -np.sort(-logp)[..., :3], atol=2e-4)
            wanted = (np.exp(final) * (final - logp)).sum(-1)
            np.testing.assert_allclose(read.kl_LxBxT[layer], wanted, atol=2e-3)
        assert np.abs(read.kl_LxBxT[-1]).max() < 1e-4  # the last layer says what the model says
        assert read.control.kl_LxBxT[-1].mean() > 0.5  # and a turned stream does not
        assert (read.ids_LxBxTxC[-1, ..., 0] == np.asarray(full.logits_BxTxV.argmax(-1))).all()


def test_files_that_are_no_lens(lm, prompts, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_lens(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("no lens")
    with pytest.raises(UserError, match="no file of a Jacobian lens"):
        load_lens(tmp_path / "text.pt")
    save_lens(tmp_path / "nan.pt", JacobianLens(np.full((3, 4, 4), np.nan), 1))
    with pytest.raises(UserError, match="damaged"):
        load_lens(tmp_path / "nan.pt")
    save_lens(tmp_path / "small.pt", JacobianLens(np.zeros((3, 4, 4)), 1))
    with pytest.raises(UserError, match="3 maps of 4 dimensions"):
        lm.lens(prompts, load_lens(tmp_path / "small.pt"))

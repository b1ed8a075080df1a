"""The Jacobian lens against Jacobians of the rest of the model, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import torch

import saejax
from saejax.errors import UserError
from saejax.interpret.jacobian_lens import SKIPPED
from saejax.models import decoder

TEXTS = ["The cat near the dogs runs, and the dogs near it run.", "One day, she said that there was a way."]


@pytest.fixture(scope="module")
def lens(lm):
    return saejax.fit_jacobian_lens(lm, [*TEXTS, "a"], [1, 2], length=12, skipped=2)


def test_it_is_the_mean_jacobian_over_texts_and_positions(lm, lens):
    """Rest of the model by itself, its whole Jacobian [T', D, T, D], and the sum over later positions on the host."""
    total_DxD = 0
    for text in TEXTS:
        ids_T = np.array(lm.encode(text)[:12])
        stream_TxD = lm([ids_T.tolist()], capture=["resid_post.1"]).sites["resid_post.1"][0]
        rest = lambda x_TxD: decoder.run_layers(lm.config, lm.params, x_TxD, 2, lm.config.n_layers).x  # noqa: E731
        jacobian_UxDxTxD = np.asarray(jax.jit(jax.jacfwd(rest))(stream_TxD), np.float64)
        assert np.abs(jacobian_UxDxTxD[3, :, 4]).max() == 0  # nothing looks ahead
        total_DxD = total_DxD + jacobian_UxDxTxD[2:-1, :, 2:-1].sum(axis=0).mean(axis=1)
    assert lens.texts == 2 and lens.sites == ("resid_post.1", "resid_post.2")
    np.testing.assert_allclose(lens.jacobians[1], total_DxD / 2, atol=2e-5 * np.abs(total_DxD).max())
    assert saejax.fit_jacobian_lens(lm, TEXTS, length=4, skipped=2).sites == tuple(f"resid_post.{i}" for i in range(3))


def test_logits_are_those_of_the_carried_stream(lm, lens):
    """Of the last layer the Jacobian is 1 at each position, and the lens is the model."""
    output = lm(lm.tokenize(TEXTS[:1]), capture=["resid_post.1", "resid_post.3", "mlp_out.1"])
    logits = lens.logits(output.sites)
    assert list(logits) == ["resid_post.1"]
    carried_BxTxD = np.asarray(output.sites["resid_post.1"], np.float64) @ lens.jacobians[1].T.astype(np.float64)
    expected_BxTxV = lm.unembed(jnp.asarray(carried_BxTxD, jnp.float32))
    np.testing.assert_allclose(logits["resid_post.1"], expected_BxTxV, atol=1e-4)
    last = saejax.fit_jacobian_lens(lm, TEXTS, [3], length=6, skipped=2)
    np.testing.assert_allclose(last.jacobians[3], np.eye(lm.config.d_model), atol=1e-6)
    np.testing.assert_allclose(last.logits(output.sites)["resid_post.3"], output.logits_BxTxV, atol=1e-4)


def test_a_disk_that_fills_leaves_no_half_a_lens(lens, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda content, file: runs.write_half(file))
    with pytest.raises(OSError, match="No space left"):
        lens.save(tmp_path / "lens.pt")
    assert not [*tmp_path.iterdir()]


def test_files_are_those_of_the_reference_implementation(lm, lens, tmp_path):
    lens.save(tmp_path / "lens.pt")
    content = torch.load(tmp_path / "lens.pt", weights_only=True)
    assert content.keys() == {"J", "n_prompts", "d_model", "source_layers"} and content["source_layers"] == [1, 2]
    loaded = saejax.load_jacobian_lens(lm, tmp_path / "lens.pt")
    assert loaded.texts == 2 and loaded.sites == lens.sites
    np.testing.assert_allclose(loaded.jacobians[2], lens.jacobians[2], rtol=1e-3, atol=1e-6)  # half precision
    with pytest.raises(UserError, match="is there already"):
        lens.save(tmp_path / "lens.pt")
    torch.save(dict(J={9: torch.eye(2)}, n_prompts=1), tmp_path / "other.pt")
    (tmp_path / "damaged.pt").write_bytes(b"no")
    for name, message in (("none", "does not exist"), ("damaged", "holds no Jacobian lens"), ("other", "layer 9 does")):
        with pytest.raises(UserError, match=message):
            saejax.load_jacobian_lens(lm, tmp_path / f"{name}.pt")


def test_numbers_beyond_half_precision_are_kept(lm, tmp_path):
    large_DxD = np.eye(lm.config.d_model, dtype=np.float32) * 1e5
    saejax.interpret.jacobian_lens.JacobianLens(lm, {1: large_DxD}, 1).save(tmp_path / "lens.pt")
    loaded = saejax.load_jacobian_lens(lm, tmp_path / "lens.pt")
    np.testing.assert_array_equal(loaded.jacobians[1], large_DxD)


def test_what_cannot_be_fitted(lm, lens):
    with pytest.raises(UserError, match=r"\[4\] is none of 0 to 3"):
        saejax.fit_jacobian_lens(lm, TEXTS, [4])
    with pytest.raises(UserError, match=r"layers is \[\]: expected some of 0 to 3"):
        saejax.fit_jacobian_lens(lm, TEXTS, [])
    for layers in (["1"], [True], [[1], [2]]):
        with pytest.raises(UserError, match="layers is .*: expected layers, such as"):
            saejax.fit_jacobian_lens(lm, TEXTS, layers)
    with pytest.raises(UserError, match=f"no text has {SKIPPED + 2} tokens"):
        saejax.fit_jacobian_lens(lm, ["a b"])
    with pytest.raises(UserError, match="the lens reads resid_post.1, resid_post.2, and the sites are mlp_out.0"):
        lens.logits({"mlp_out.0": jnp.zeros((1, 1, 1))})

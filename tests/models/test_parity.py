"""The comparison with transformers that fields of unknown effect call for."""

import numpy as np
import pytest
from loaded_models import change_config

import saejax
from saejax.errors import UserError
from saejax.models import parity

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def compared(monkeypatch):
    """The models that were loaded into PyTorch."""
    loaded, load = [], parity.source.load_torch_model
    monkeypatch.setattr(
        parity.source, "load_torch_model", lambda model, dtype: loaded.append(dtype) or load(model, dtype)
    )
    return loaded


def test_the_first_load_of_an_unknown_field_compares_and_later_ones_do_not(copy, compared):
    saejax.load_model(str(copy))
    assert compared == []
    saejax.load_model(str(copy), check=True)
    assert compared == ["float32"]
    change_config(copy, logit_scale_of_nobody=0.5)
    saejax.load_model(str(copy), check=False)
    assert compared == ["float32"]
    for _ in range(2):
        saejax.load_model(str(copy))
        saejax.load_model(str(copy), dtype="bfloat16")
    assert compared == ["float32", "float32", "bfloat16"]


def test_a_field_that_changes_results_is_refused_with_the_numbers(copy, monkeypatch):
    """As a field would that transformers honours and the decoder does not: here its weights are doubled."""
    change_config(copy, unknown_scale=2.0)
    load = parity.source.load_torch_model

    def scaled(found, dtype):
        model = load(found, dtype)
        model.model.layers[1].mlp.down_proj.weight.data *= 2
        return model

    monkeypatch.setattr(parity.source, "load_torch_model", scaled)
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(UserError, match=r"differ from those of transformers by 0\.\d+ of .*know: unknown_scale"):
            saejax.load_model(str(copy))


def test_a_cache_that_cannot_be_written_is_no_obstacle(copy, compared, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "file" / "cache"))
    change_config(copy, unknown=1)
    for _ in range(2):
        saejax.load_model(str(copy))
    assert len(compared) == 2


def test_the_error_is_relative_to_the_spread_of_the_logits():
    rng = np.random.default_rng(0)
    theirs_TxV = rng.standard_normal((5, 7))
    noise_TxV = rng.standard_normal((5, 7))
    noise_TxV -= noise_TxV.mean(-1, keepdims=True)
    expected = 1e-3 * np.linalg.norm(noise_TxV) / np.linalg.norm(theirs_TxV - theirs_TxV.mean(-1, keepdims=True))
    error = parity.relative_error(theirs_TxV + 100 + 1e-3 * noise_TxV, theirs_TxV)  # a constant changes no probability
    np.testing.assert_allclose(error, expected, rtol=1e-9)
    theirs_TxV[0, 0] = np.nan
    assert parity.relative_error(noise_TxV, theirs_TxV) == float("inf")

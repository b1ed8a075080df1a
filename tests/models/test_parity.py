"""The comparison with transformers that fields of unknown effect call for."""

import numpy as np
import pytest
from loaded_models import change_config

import saejax
from saejax.errors import UserError
from saejax.models import parity
from saejax.models.sites import KINDS, NEURONS

pytestmark = pytest.mark.usefixtures("cache", "single_device")


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
        with pytest.raises(UserError, match=r"differ from those of transformers by [\d.]+ of .*know: unknown_scale"):
            saejax.load_model(str(copy))


def test_a_cache_that_cannot_be_written_is_no_obstacle(copy, monkeypatch, tmp_path):
    compared, equal = [], {"random tokens": {parity.LOGITS: parity.Error(0.0, -1)}}
    monkeypatch.setattr(parity, "measure", lambda lm, dtype: compared.append(dtype) or equal)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "file" / "cache"))
    change_config(copy, unknown=1)
    for _ in range(2):
        saejax.load_model(str(copy))
    assert len(compared) == 2


def test_a_difference_is_found_where_it_is(copy):
    """A decoder whose second layer reads other weights differs from there on, on random tokens and on real text."""
    lm = saejax.load_model(str(copy))
    lm.params["layers.down_FxD"] = lm.params["layers.down_FxD"].at[1].multiply(1.01)
    measured = parity.measure(lm, "float32", ["The cat near the dogs runs.", "3 + 4 ="])
    assert list(measured) == ["random tokens", "real text"]
    for errors in measured.values():
        assert set(errors) == {*KINDS, NEURONS, "logits"}
        assert errors["mlp_out"].value >= 0.0099 and errors["mlp_out"].layer >= 1
        assert errors["resid_post"].value > 1e-4 and errors["logits"].value > 1e-4 and errors["logits"].layer == -1
    lm.params["layers.down_FxD"] = lm.params["layers.down_FxD"].at[1].divide(1.01)
    exact = parity.measure(lm, "float32")
    assert max(error.value for errors in exact.values() for error in errors.values()) < 1e-5


def test_errors_are_relative_to_the_largest():
    theirs_NxD = np.array([[4.0, -8.0], [0.0, 0.0]], np.float32)
    ours_NxD = theirs_NxD.copy()
    ours_NxD[1, 0] = 2.0
    assert parity.relative_error(ours_NxD, theirs_NxD) == 0.25
    ours_NxD[0, 0] = np.nan
    assert parity.relative_error(ours_NxD, theirs_NxD) == parity.relative_error(theirs_NxD, ours_NxD) == np.inf

"""The measurement of a dictionary on a sample of text, and what loading one does to logging."""

import logging
import re

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from known_dictionaries import make

from saejax import load_dictionary, save_dictionary
from saejax.dictionaries import Dictionary, DictionaryConfig, check_dictionary
from saejax.errors import UserError


def identity(d: int, **changes) -> Dictionary:
    """A dictionary that reconstructs everything: a linear basis of positive and negative directions."""
    rows = np.concatenate([np.eye(d), -np.eye(d)]).astype(np.float32)
    config = dict(kind="standard", site="resid_post.0", d_in=d, n_features=2 * d, centred=False) | changes
    arrays = dict(W_enc_DxF=rows.T, b_enc_F=np.zeros(2 * d), W_dec_FxD=rows, b_dec_D=np.zeros(d))
    return Dictionary(DictionaryConfig(**config), **{name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})


def test_what_a_dictionary_explains_is_logged(lm, caplog):
    """One that reconstructs everything; one of something else is warned of."""
    d, wrong = lm.config.d_model, identity(lm.config.d_model)
    wrong.W_dec_FxD[...] = -wrong.W_dec_FxD[...]
    with caplog.at_level(logging.INFO, "absl"):
        check = check_dictionary(lm, identity(d))
        assert check_dictionary(lm, wrong).explained_variance < 0
    assert check.explained_variance == pytest.approx(1) and check.l0 == pytest.approx(d, abs=0.5)
    assert 30 < check.tokens <= 64 and [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "standard dictionary of resid_post.0: L0 " in caplog.messages[0]
    assert "trained on another site or model" in caplog.messages[1]


@pytest.mark.parametrize("site", ["unknown", "mlp_normed.0", "module:model.layers.0"])
def test_what_the_model_has_no_site_for_cannot_be_measured(lm, site):
    with pytest.raises(UserError, match="cannot be measured"):
        check_dictionary(lm, identity(lm.config.d_model, site=site))


def test_a_crosscoder_of_two_models_cannot_be_measured_on_one(lm):
    d = lm.config.d_model
    with pytest.raises(UserError, match="cannot be measured"):
        check_dictionary(lm, identity(2 * d, site="resid_post.0+other:resid_post.0", widths=(d, d)))


def test_loading_logs_what_a_dictionary_is_and_measures_it(lm, tmp_path, caplog):
    save_dictionary(tmp_path / "saelens", identity(lm.config.d_model, bos="always"), "saelens")
    with caplog.at_level(logging.INFO, "absl"):
        load_dictionary(tmp_path / "saelens", lm=lm)
    d = lm.config.d_model
    first, second = (record.getMessage() for record in caplog.records)
    told = f"SAELens: standard of resid_post.0, width {d}, {2 * d} features; texts always began with BOS"
    assert first == told and "explained variance 1.000" in second
    with caplog.at_level(logging.INFO, "absl"):  # saving and loading through Orbax must not silence absl for good
        save_dictionary(tmp_path / "orbax", make())
        load_dictionary(tmp_path / "orbax")
        caplog.clear()
        absl_logging.info("an information of the user's")
        assert caplog.messages == ["an information of the user's"]


@pytest.mark.parametrize(
    "trained,begins,told",
    [
        ("auto", False, ""),
        ("always", True, ""),
        ("never", False, ""),
        ("always", False, "trained on texts with a BOS token in front, and these are without"),
        ("never", True, "trained on texts without a BOS token in front, and these are with: .*--capture.bos=never"),
    ],
)
def test_texts_that_begin_otherwise_than_those_of_the_training_are_told(trained, begins, told):
    conflict = DictionaryConfig(bos=trained).bos_conflict(begins)
    assert re.search(told, conflict) and bool(conflict) == bool(told)

"""The decoder against transformers, by the stage: what it measures, and when it fails."""

import numpy as np
import pytest
from runs import make_configs
from tiny_models import save_tiny_llama, save_tiny_tokenizer

from saejax.models.settings import ModelConfig
from saejax.models.sites import KINDS, Site
from saejax.models.tokens import Tokens
from saejax.preflight import parity
from saejax.runner import command
from saejax.stages.preflight import run as checks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two layers, one key-value head, heads of an odd width over 2, a tied embedding."""
    folder = tmp_path_factory.mktemp("parity")
    changes = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=10)
    save_tiny_llama(folder, seed=3, tie_word_embeddings=True, **changes)
    save_tiny_tokenizer(folder, 384)
    return folder


def preflight(tmp_path, *flags) -> int:
    return command.run(["preflight"], "", ["preflight", f"--workdir={tmp_path}", "--preflight.parity", *flags])


def test_it_passes_and_prints_every_kind(tmp_path, folder, capsys):
    assert preflight(tmp_path, f"--model.path={folder}") == 0
    output = capsys.readouterr().out
    assert "memory could not be estimated: " in output, "it has no layer 15, which parity does not need"
    for tokens in ("random tokens", "real text"):
        for kind in (*KINDS, "logits"):
            (line,) = (line for line in output.splitlines() if tokens in line and f" {kind} " in line)
            assert 0 <= float(line.split(kind)[1].split()[0]) < 1e-5


def test_above_the_tolerance_the_status_is_1(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setitem(checks.TOLERANCE, "float32", 1e-9)
    assert preflight(tmp_path, f"--model.path={folder}") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("failed: ") and "more than 1e-09" in error and "\n" not in error
    assert not (tmp_path / "preflight" / "done.json").exists()


def test_a_difference_is_found_where_it_is(folder, one_device, monkeypatch):
    """A decoder whose second layer reads other weights differs from there on."""
    load = parity.load_model

    def load_changed(*arguments, **options):
        lm = load(*arguments, **options)
        weights = lm.params["layers.down_FxD"]
        lm.params["layers.down_FxD"] = weights.at[1].multiply(1.01)
        return lm

    monkeypatch.setattr(parity, "load_model", load_changed)
    model = ModelConfig(path=str(folder))
    for errors in parity.measure(make_configs(), model, one_device).values():
        assert errors["mlp_out"].value == pytest.approx(0.01, rel=1e-3) and errors["mlp_out"].layer == 1
        assert errors["mlp_in"].value < 1e-5
        assert errors["resid_post"].value > 1e-4 and errors["logits"].value > 1e-4


def test_errors_are_relative_to_the_largest_and_ignore_padding():
    tokens = Tokens(np.zeros((2, 3), np.int32), np.array([3, 1], np.int32))
    theirs = np.zeros((2, 3, 2), np.float32)
    theirs[0, 0] = [4.0, -8.0]
    theirs[1, 2] = 1000.0  # padding
    ours = theirs.copy()
    ours[0, 1, 0] = 2.0
    ours[1, 2] = -1000.0
    sites = {Site(kind, layer): theirs for kind in KINDS for layer in range(2)}
    mine = sites | {Site("mlp_in", 1): ours}
    errors = parity._errors(tokens, (theirs, sites), (ours, mine))
    assert errors["mlp_in"].value == 0.25 and errors["mlp_in"].layer == 1
    assert errors["mlp_out"].value == 0 and errors["logits"].value == 0.25
    broken = ours.copy()
    broken[0, 0, 0] = np.nan
    assert parity._errors(tokens, (theirs, sites), (broken, mine))["logits"].value == np.inf


def test_what_parity_cannot_do(tmp_path, folder, capsys):
    assert preflight(tmp_path, "--preflight.models=configs/shapes/phi-2.json", f"--model.path={folder}") == 2
    assert "phi-2.json is only its shape" in capsys.readouterr().err
    assert preflight(tmp_path, f"--model.path={folder}", "--preflight.topology=v5e:2x4") == 2
    assert "leave --preflight.topology out" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2(tmp_path):
    assert preflight(tmp_path) == 0

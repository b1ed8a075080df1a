"""The decoder against transformers, by the stage: what is printed, and when it fails."""

import pytest
from tiny_models import save_tiny_llama, save_tiny_tokenizer

from saejax.models import parity
from saejax.models.sites import KINDS, NEURONS
from saejax.runner import command
from saejax.stages.preflight.settings import PreflightConfig


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
        for kind in (*KINDS, NEURONS, "logits"):
            (line,) = (line for line in output.splitlines() if tokens in line and f" {kind} " in line)
            assert 0 <= float(line.split(kind)[1].split()[0]) < 1e-5


def test_the_help_says_what_fails():
    help = PreflightConfig.__dataclass_fields__["parity"].metadata["help"]
    assert all(f"{error:g}" in help for error in parity.TOLERANCE.values())


def test_above_the_tolerance_the_status_is_1(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setitem(parity.TOLERANCE, "float32", 1e-9)
    assert preflight(tmp_path, f"--model.path={folder}") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("failed: ") and "more than 1e-09" in error and "\n" not in error
    assert not (tmp_path / "preflight" / "done.json").exists()


def test_what_parity_cannot_do(tmp_path, folder, capsys):
    assert preflight(tmp_path, "--preflight.models=configs/shapes/phi-2.json", f"--model.path={folder}") == 2
    assert "phi-2.json is only its shape" in capsys.readouterr().err
    assert preflight(tmp_path, f"--model.path={folder}", "--preflight.topology=v5e:2x4") == 2
    assert "leave --preflight.topology out" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2(tmp_path):
    assert preflight(tmp_path) == 0

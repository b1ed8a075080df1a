"""The stages from the prompts to the report, on architectures that run in PyTorch alone."""

import jax
import pytest
import runs
from tiny_models import save_tiny

from saejax.runner import command

pytestmark = pytest.mark.slow
STAGES = ["baseline", "capture", "train", "evaluate", "interpret", "ablate", "report"]
SETTINGS = dict(
    train__kinds="topk",
    train__epochs=2,
    interpret__dictionaries="topk",
    interpret__attention_tokens=0,
    task__train_prompts=2,
    task__test_prompts=2,
    task__behaviours="agreement,addition",
    ablate__baselines="pca,diff_means",
    ablate__untrained=False,
)
# Rotary parallel layers, ALiBi, a mixture of experts, and linear attention between layers of full attention.
FAMILIES = {
    "olmo": dict(max_position_embeddings=256),
    "gptj": dict(n_positions=256),
    "bloom": {},
    "mixtral": dict(max_position_embeddings=256),
    "qwen3_5_text": dict(max_position_embeddings=256),
}


@pytest.fixture(autouse=True)
def single_device(monkeypatch):
    """TorchModel runs on one device."""
    devices = jax.devices()[:1]
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda *of: devices)
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(jax, name, lambda *of: 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_an_architecture_without_a_jax_family(family, tmp_path, inputs):
    model, workdir = tmp_path / "model", tmp_path / "run"
    save_tiny(model, family, vocab_size=1024, **FAMILIES[family])
    runs.small_tokenizer().save_pretrained(model)
    flags = runs.small_flags(model, inputs[1], workdir, **SETTINGS)
    assert command.run(STAGES, "", ["program", *flags]) == 0

    for unit in ("baseline", "capture", "train/topk", "evaluate/topk", "interpret/topk", "ablate/topk"):
        assert (workdir / unit / "done.json").exists(), unit
    assert "Ablation" in (workdir / "report" / "report.md").read_text(encoding="utf-8")

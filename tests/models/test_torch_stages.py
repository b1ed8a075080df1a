"""The stages from the captured activations to the report, on architectures that run in PyTorch alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from saejax import load_dictionary, load_results
from saejax.activations.store import Store
from saejax.runner import command

pytestmark = pytest.mark.slow
STAGES = [
    "baseline",
    "capture",
    "train",
    "evaluate",
    "interpret",
    "ablate",
    "patch",
    "steer",
    "probe",
    "atlas",
    "report",
]
SETTINGS = dict(
    train__kinds="topk",
    train__epochs=2,
    interpret__dictionaries="topk",
    interpret__attention_tokens=0,
    task__train_prompts=10,
    task__test_prompts=6,
    task__behaviours="agreement,addition",
    ablate__baselines="pca,diff_means",
    ablate__untrained=False,
    patch__kinds="resid_pre,mlp_out",
    patch__dictionary="topk",
    patch__top=3,
    patch__draws=2,
    patch__bootstrap=200,
    steer__dictionary="topk",
    steer__top=3,
    steer__doses="0.5",
    steer__draws=40,
    steer__draw_prompts=3,
    steer__text_documents=2,
    steer__bootstrap=200,
    probe__labels="behaviour",
    probe__sparse="1,2",
    probe__strengths="0.1,1",
    probe__folds=2,
    probe__shuffles=2,
    probe__permutations=200,
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

    # The scores follow from the store, and the store from transformers' own model.
    score = load_results(workdir / "evaluate" / "topk").members[0]
    dictionary, store = load_dictionary(workdir / "train" / "topk"), Store.open(workdir / "capture")
    x_NxD = np.asarray(store.read("resid_post.0", store.rows("held_out", "resid_post.0")), np.float64)
    error_NxD = np.asarray(dictionary(jnp.asarray(x_NxD, jnp.float32)), np.float64) - x_NxD
    assert score.fvu == pytest.approx((error_NxD**2).sum() / ((x_NxD - x_NxD.mean(axis=0)) ** 2).sum(), rel=1e-3)
    documents = store.documents.of("held_out")[:3]
    assert score.ce.clean == pytest.approx(cross_entropy(model, documents), rel=1e-4)
    assert score.ce.clean < score.ce.zero_ablated

    verdict = load_results(workdir / "ablate" / "topk").verdict.dictionaries["tested"]
    assert set(verdict) == {"agreement", "addition"}
    assert load_results(workdir / "interpret" / "topk").members[0].features == dictionary.config.n_features
    for stage in ("patch", "steer", "probe"):
        assert all((unit / "done.json").exists() for unit in (workdir / stage).iterdir())
    assert "resid_post.0" in (workdir / "report" / "report.md").read_text()


def cross_entropy(model, documents) -> float:
    """Mean over the predicted tokens, by transformers itself, a document at a time."""
    torch_model, losses = AutoModelForCausalLM.from_pretrained(model).eval(), []
    for document in documents:
        ids = torch.tensor(np.asarray(document, np.int64))[None]
        with torch.no_grad():
            logits = torch_model(ids).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return float(np.mean(losses))

"""The stages from the prompts to the report, on architectures that run in PyTorch alone."""

import json

import pytest
import runs
import settings_read
from tiny_models import save_tiny

from saejax.runner import command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_device")]
STAGES = ["baseline", "benchmark", "capture", "train", "evaluate", "interpret"]
STAGES += ["ablate", "patch", "probe", "steer", "study", "atlas", "report"]
UNITS = ["baseline", "capture", "report", "patch/mlp_out", "study/gsm8k"]
UNITS += [f"{stage}/topk" for stage in ("train", "evaluate", "interpret", "ablate", "patch", "probe", "steer")]
SETTINGS = dict(train__kinds="topk", train__epochs=2, interpret__dictionaries="topk")
SETTINGS |= dict(task__train_prompts=12, task__test_prompts=24, task__behaviours="agreement", task__shots=0)
SETTINGS |= dict(task__benchmarks="gsm8k", task__examples=6, task__max_new_tokens=4)
SETTINGS |= dict(ablate__baselines="pca,diff_means", ablate__untrained_dictionaries=0, ablate__attribution_prompts=2)
SETTINGS |= dict(patch__kinds="mlp_out", patch__dictionary="topk")
SETTINGS |= dict(causal__random_sets=4, causal__placebo_targets=2)
SETTINGS |= dict(probe__labels="answer", probe__sparse="1", probe__shuffles=2)
SETTINGS |= dict(steer__dictionary="topk")
SETTINGS |= dict(study__benchmarks="gsm8k")
SETTINGS |= dict(study__baselines="", study__untrained_dictionaries=0)
# Rotary parallel layers, ALiBi, a mixture of experts, and linear attention between layers of full attention.
FAMILIES = {
    "olmo": dict(max_position_embeddings=256),
    "gptj": dict(n_positions=256),
    "bloom": {},
    "mixtral": dict(max_position_embeddings=256),
    "qwen3_5_text": dict(max_position_embeddings=256),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_an_architecture_without_a_jax_family(family, tmp_path, inputs):
    model, workdir = tmp_path / "model", tmp_path / "run"
    save_tiny(model, family, vocab_size=1024, **FAMILIES[family])
    runs.small_tokenizer().save_pretrained(model)
    questions = [dict(question=f"What is {n} plus {n}?", answer=f"{n} + {n} = {2 * n}\n#### {2 * n}") for n in range(6)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    flags = runs.small_flags(model, inputs[1], workdir, task__path=tmp_path / "gsm8k.jsonl", **SETTINGS)
    assert command.run(STAGES, "", ["program", *flags]) == 0
    for unit in UNITS:
        assert (workdir / unit / "done.json").exists(), unit
    assert (workdir / "report" / "index.html").exists()
    steered = json.loads((workdir / "steer" / "topk" / "done.json").read_text())["results"]["behaviours"]["agreement"]
    assert steered["reason"] is None
    assert "Ablation" in (workdir / "report" / "report.md").read_text(encoding="utf-8")
    # Statement 3 of WORKSPACE.md, what must hold: a hash covers what the code reads, no more.
    assert settings_read.never_read("patch", "probe", "steer", "study") <= {"probe.benchmarks"}  # decides what is read

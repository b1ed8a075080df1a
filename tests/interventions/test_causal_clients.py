"""Patch, steer and probe as library calls and stages: 8 devices and PyTorch give the same as one JAX device."""

import dataclasses
import numbers
from pathlib import Path

import jax
import pytest
from runs import write_members

import saejax
from saejax.dictionaries import Dictionary, save_dictionary
from saejax.interventions.patch_run import run_patch
from saejax.interventions.probe_run import run_probe
from saejax.interventions.steer_run import run_steer
from saejax.results import to_json
from saejax.runner.config import Configs
from saejax.runner.workspace import Run
from saejax.settings import (
    AblateConfig,
    CorpusConfig,
    MeshConfig,
    ModelConfig,
    PatchConfig,
    ProbeConfig,
    SteerConfig,
    StudyConfig,
    TaskConfig,
)
from saejax.tasks.behaviours import PromptScore, write_prompts

DOCUMENTS = ["The river follows the teacher.", "The garden carries the engine and so on."]
STEER = dict(top=3, doses=(0.4, 0.1), random_sets=3, bootstrap=200)
PROBE = dict(sparse=(1, 2), shuffles=2, strengths=(0.01, 1.0))


@pytest.fixture(scope="module")
def asked(tiny, make_prompt):
    """32 prompts that the model answers correctly, with counterparts of as many tokens and a label to probe."""
    prompts = [make_prompt(i, "train" if i < 16 else "test", varied=False) for i in range(32)]
    prompts = [dataclasses.replace(p, wrong=" far") for p in prompts]  # few pairs of answers, each a run of its own
    swapped = [dataclasses.replace(p, correct=p.wrong, wrong=p.correct) for p in prompts]
    outputs = [tiny(tiny.tokenize([p.text])) for p in prompts]
    right = [
        p if o.logit(p.correct) > o.logit(p.wrong) else s for p, s, o in zip(prompts, swapped, outputs, strict=True)
    ]
    return [
        dataclasses.replace(
            prompt,
            counterpart=prompt.text.replace(" near ", " that "),
            template=str(i % 2),
            labels=(("length", "long" if i % 4 > 1 else "short"),),
        )
        for i, prompt in enumerate(right)
    ]


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    """Thresholds lie apart from the activations of these prompts: no firing hangs on the last bit."""
    made = make_dictionary("resid_post.1")
    return Dictionary(made.config, **made.arrays | dict(b_enc_F=made.b_enc_F[...] - 1e-3))


def call_all(lm, dictionary, prompts):
    """Return what the three calls give, as JSON data."""
    patched = saejax.patch(lm, prompts, "resid_post", layers=[1, 2])
    steered = saejax.steer(lm, dictionary, prompts, documents=DOCUMENTS, **STEER)
    probed = saejax.probe(lm, dictionary, prompts, ["length", "correct"], **PROBE)
    return dict(
        patch=dict(effect=patched.effect_DxLxHxPxC[..., -3:].tolist()),
        steer={name: to_json(result) for name, result in steered.items()},
        probe=[to_json(label) for label in probed],
    )


@pytest.fixture(scope="module")
def on_one_device(tiny, dictionary, asked):
    return call_all(tiny, dictionary, asked)


def assert_close(found, wanted, where=""):
    """The same data but for rounding: 1e-5 of numbers, 1e-6 of large ones, which sentences print to two digits.

    The p-values of ablated features count 10,000 bootstrap samples on either side of zero. Each sample whose mean is so
    near zero that rounding decides its side moves p by 2e-4; here one does, and up to five may.
    """
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for place, value in enumerate(wanted):
            assert_close(found[place], value, f"{where}[{place}]")
    elif isinstance(wanted, numbers.Real):
        limit = 1e-3 if where.endswith(("p_value", "p_holm")) else 1e-5
        assert found == pytest.approx(wanted, rel=1e-6, abs=limit, nan_ok=True), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("where", ["eight devices", "torch"])
def test_library_calls_write_nothing_and_equal_those_on_one_device(
    where, tiny, tiny_llama, dictionary, asked, on_one_device, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if where == "torch":
        lm = saejax.load_model(str(tiny_llama), backend="torch", mesh=tiny.mesh)
    else:
        lm = saejax.load_model(str(tiny_llama))
        assert lm.mesh.size == len(jax.devices()) == 8
    assert_close(call_all(lm, dictionary, asked), on_one_device)
    assert not list(tmp_path.iterdir())


def test_results_are_not_empty(on_one_device):
    steered = on_one_device["steer"]["tiny"]
    assert steered["reason"] is None and set(steered["methods"]) == {"add", "clamp", "mean_difference"}
    for method in steered["methods"].values():
        assert method["controls"] > 0 and method["points"][0]["ce_rise"] is not None
    length, correct = on_one_device["probe"]
    assert len(length["probes"]) == 6 and length["selected"]["matched"]
    assert correct["reason"].startswith("fewer than two classes")


def test_controls_are_drawn_by_the_seed_of_interventions():
    assert {config().seed for config in (AblateConfig, PatchConfig, SteerConfig, ProbeConfig, StudyConfig)} == {456}


CONFIGS = dict(
    patch=PatchConfig(dictionary="topk", kinds=("mlp_out",), top=3, random_sets=6, placebo_targets=3, bootstrap=200),
    steer=SteerConfig(dictionary="topk", **STEER),
    probe=ProbeConfig(labels=("length",), **PROBE),
)


@pytest.mark.parametrize(
    "run_stage, unit",
    [
        pytest.param(run_patch, "mlp_out", id="sites", marks=pytest.mark.slow),  # the calls above are compared, too
        pytest.param(run_patch, "topk", id="features"),
        pytest.param(run_steer, "topk", id="steer", marks=pytest.mark.slow),
        pytest.param(run_probe, "topk", id="probe"),
    ],
)
def test_stages_in_pytorch_equal_those_in_jax(run_stage, unit, tiny_llama, dictionary, asked, tmp_path, monkeypatch):
    devices = jax.devices()[:1]  # a model in PyTorch runs on one
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda *of: devices)
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(jax, name, lambda *of: 1)
    baseline, train = tmp_path / "baseline", tmp_path / "train" / "topk"
    baseline.mkdir()
    write_prompts(baseline / "prompts.jsonl", asked, [PromptScore(1.0, True, None)] * len(asked))
    save_dictionary(train, dictionary)
    write_members(train, "")

    def run(backend: str):
        folder: Path = tmp_path / backend
        folder.mkdir()
        stage = run_stage.__name__.removeprefix("run_")
        groups = (MeshConfig(), CorpusConfig(), TaskConfig(), CONFIGS[stage])
        configs = Configs(ModelConfig(path=str(tiny_llama), backend=backend), *groups)
        inputs = {"baseline": baseline, "train/topk": train}
        return to_json(run_stage(Run(stage, unit, folder, configs, inputs, say=lambda line: None)))

    assert_close(run("torch"), run("jax"))

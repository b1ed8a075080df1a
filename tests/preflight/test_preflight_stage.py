"""The stage: what it prints and writes, when it refuses, and what makes it run again."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import runs
from preflight_setup import CONFIGS

from saejax.preflight import topology
from saejax.runner import command, command_line
from saejax.runner.flags import flag_fields
from saejax.runner.registry import all_groups
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import Workspace
from saejax.stages.preflight import run as checks

SHAPES = CONFIGS / "shapes"


def preflight(*flags: str) -> int:
    return command.run(["preflight"], "", ["preflight", *flags])


def listed(tmp_path, *names: str) -> list[str]:
    return [f"--workdir={tmp_path}", "--preflight.models=" + ",".join(str(SHAPES / f"{name}.json") for name in names)]


@pytest.fixture
def host(monkeypatch):
    """host(gib): makes this host's free memory so large."""

    def set_memory(gib: float) -> None:
        for module in (topology, checks):
            monkeypatch.setattr(module, "free_host_bytes", lambda: int(gib * 2**30))

    return set_memory


def test_a_list_of_models(tmp_path, capsys, host, quick_compiler):
    host(8 * 200)
    small = ["--model.dtype=bfloat16", "--task.behaviours=", "--train.kinds=topk"]
    assert preflight(*listed(tmp_path, "smollm2-135m", "qwen3-0.6b"), "--mesh.model=8", *small) == 0
    output = capsys.readouterr().out
    assert "smollm2-135m.json: 134.5 M parameters, 30 layers, bfloat16" in output
    assert "qwen3-0.6b.json: 596.0 M parameters, 28 layers, bfloat16" in output
    results = json.loads((tmp_path / "preflight" / "done.json").read_text())["results"]
    assert [model["parameters"] for model in results["models"]] == [134_515_008, 596_049_920]
    assert results["mesh"]["axes"] == dict(member=1, data=1, model=8) and "seconds" not in results
    for model in results["models"]:
        assert model["fits"] and model["peak_bytes"] == max(program["memory"] for program in model["programs"])


def test_one_model_is_planned(tmp_path, inputs, capsys):
    assert preflight(*runs.small_flags(*inputs, tmp_path)) == 0
    results = json.loads((tmp_path / "preflight" / "done.json").read_text())["results"]
    assert set(results["seconds"]) == {"capture", "train", "evaluate", "ablate"}
    assert all(0 < seconds < 3600 for seconds in results["seconds"].values())
    assert results["device_hours"] == pytest.approx(sum(results["seconds"].values()) / 3600)
    assert results["documents"] == 40 and results["tokens"] > 500
    assert results["disk_bytes"] > 0 and results["host_bytes"] > 0
    assert "device-hours" in capsys.readouterr().out
    assert preflight(*runs.small_flags(*inputs, tmp_path)) == 0
    assert checks.describe_long_run(results["seconds"]) == ""
    for stage in results["seconds"]:  # the last line before a long run starts
        line = checks.describe_long_run(results["seconds"] | {stage: 7200.0})
        assert f"about 2.0 hours, 2.0 of them in {stage}: {checks.SHORTENING[stage]} shortens it" in line
    flags = {name for group, config in all_groups().items() for name in flag_fields(group, config)}
    assert {flag.removeprefix("--") for flag in checks.SHORTENING.values()} <= flags
    assert "done before, unchanged" in capsys.readouterr().out
    changed = runs.small_flags(*inputs, tmp_path, ablate__top=3)
    plan, space = (
        Workplan(command_line.read_configs(command_line.stage_flags(), ["program", *changed])),
        Workspace(tmp_path),
    )
    for unit in ("capture", "train/topk", "train/standard"):
        with space.claim(unit, plan.fingerprint(unit)):
            space.begin(unit, plan.fingerprint(unit))
            space.finish(unit, plan.fingerprint(unit), dict(results={}))
    assert preflight(*changed) == 0 and "since they are done: capture, train\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "preflight" / "done.json").read_text())["results"]
    assert set(results["seconds"]) == {"evaluate", "ablate"} and results["disk_bytes"] == results["host_bytes"] == 0
    # A dry run tells in moments what is left, and what to run where no preflight has told the memory.
    for workdir, memory in (
        (tmp_path, "as preflight found it: evaluate 0."),
        (tmp_path / "new", "programs of capture, "),
    ):
        flags = [*runs.small_flags(*inputs, workdir), "--dry_run"]
        assert command.run(["preflight", "capture", "train", "evaluate"], "", ["program", *flags]) == 0
        output = capsys.readouterr().out
        assert memory in output and ("disk: about 0.0 GiB needed, " in output) == (workdir != tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_long_run_is_told_at_every_start(tmp_path, inputs, capsys, monkeypatch):
    monkeypatch.setattr(checks.rates, "matmul_rates", lambda: dict(float32=1e5, bfloat16=1e5))
    changes = dict(study__benchmarks="word_problems", study__scored_sets=40, task__examples=40, task__behaviours="")
    flags = runs.small_flags(*inputs, tmp_path, **changes, interpret__dictionaries="topk", cluster__dictionaries="topk")
    for found in ("preflight: started", "preflight: done before, unchanged"):
        assert preflight(*flags) == 0
        output = capsys.readouterr().out
        last = [line for line in output.splitlines() if "done in" not in line][-1]
        assert found in output and re.search(r"this run will take about .* in study: --study.items shortens it", last)
        assert ("; not estimated: cluster" in output) == ("started" in found)
    results = json.loads((tmp_path / "preflight" / "done.json").read_text())["results"]
    assert set(results["seconds"]) == {"capture", "train", "evaluate", "study", "interpret"}


def test_a_machine_without_bfloat16(tmp_path, inputs, capsys, monkeypatch):
    monkeypatch.setattr(checks.rates, "matmul_rates", lambda: dict(float32=1e11, bfloat16=5e10))
    changes = dict(capture__dtype="bfloat16", train__input="resident")
    assert preflight(*runs.small_flags(*inputs, tmp_path, **changes)) == 0
    output = capsys.readouterr().out
    assert re.search(r"activations that stay on the devices: 0\.\d+ GiB on each", output)
    assert "--capture.dtype=float32 would take less time" in output and "--train.matmul=float32 would" not in output


def test_what_does_not_fit(tmp_path, capsys, inputs, host):
    host(8 * 1e-4)
    assert preflight(*runs.small_flags(*inputs, tmp_path)) == 2
    error = capsys.readouterr().err
    assert re.search(r"needs about \d+\.\d GiB per device for \S+: .* but there are 0\.0: use more devices", error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--train.sites=resid_post.29 --capture.sites=resid_post.29",
            "qwen3-0.6b.json: there is no site resid_post.29",
        ),
        ("--mesh.model=3", "make the product 8"),
        ("--train.batch=31", "--train.batch=31 is not divisible by the 8 devices"),
        ("--train.k=10000", "--train.k=10000 is more than the 8192 features"),
        ("--preflight.topology=v5e:9x9x9", "--preflight.topology=v5e:9x9x9"),
        ("--corpus.context=40961", "--corpus.context=40961 exceeds the model's context of 40960 tokens"),
    ],
)
def test_bad_input(tmp_path, capsys, host, flags, message):
    host(8 * 200)
    assert preflight(*listed(tmp_path, "qwen3-0.6b"), *flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_least_hours_are_those_of_the_devices_that_a_slice_has():
    program = SimpleNamespace(flops=197e12, runs=3600)  # an hour of a v5e
    model, said = SimpleNamespace(name="model", programs=[program]), []
    for topology_name, kind, hours in (("v5e:2x4", "TPU v5 lite", 1.0), ("h100:1x8", "cpu", 197 / 989)):
        place = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)])))
        checks._say_least_hours(SimpleNamespace(say=said.append), model, topology_name, place)
        assert f"{hours:.3f} device-hours in bfloat16" in said[-1] and f"at the peak of {topology_name}" in said[-1]

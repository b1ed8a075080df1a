"""Benchmarks that nothing else runs: the check of a first run on an accelerator, and the input's speed."""

import json
import sys
import types
from dataclasses import replace

import jax
import pytest

from benchmarks import bench_input, bench_quality, gpu_check
from saejax.dictionaries.kinds import by_name
from saejax.models import fused_attention
from saejax.runner import command_line
from saejax.training.settings import TrainConfig


def test_gradients_agree_with_finite_differences_and_a_broken_one_is_noticed(monkeypatch, capsys):
    """Its forward pass is right, and a fifth is lost on the way back."""
    assert gpu_check.check_gradient("jumprelu") and gpu_check.check_gradient("batchtopk")

    @jax.custom_vjp
    def broken(pre_BxF):
        return jax.nn.relu(pre_BxF)

    broken.defvjp(lambda pre: (jax.nn.relu(pre), pre > 0), lambda positive, ct: (0.8 * ct * positive,))
    standard = type(by_name("standard"))
    encode = lambda self, member, inputs, numbers, settings: broken(inputs.pre_xF)  # noqa: E731
    monkeypatch.setattr(standard, "encode_in_training", encode)
    assert not gpu_check.check_gradient("standard")
    assert "WRONG gradient standard" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_input_pipeline_is_timed(monkeypatch, capsys, dtype):
    sizes = ["--rows=3000", "--d=8", "--batch=64", "--shard_rows=1024"]
    monkeypatch.setattr(sys, "argv", ["bench_input", *sizes, f"--dtype={dtype}"])
    bench_input.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["rows"] == 3000 and figures["pipeline, later epochs (ms)"] > 0


@pytest.mark.parametrize("kind", bench_quality.OURS)
def test_flags_of_the_comparison_with_sae_lens_exist(monkeypatch, tmp_path, kind):
    commands = []
    monkeypatch.setattr(bench_quality.subprocess, "run", lambda command, **options: commands.append(command))
    monkeypatch.setattr(bench_quality.stacks, "members", lambda folder: [])
    args = types.SimpleNamespace(folder=tmp_path, tokens=1000, held_out=0.1)
    bench_quality.measure_ours(kind, [dict(l0=20.0), dict(l0=30.0)], None, args)
    configs = command_line.read_configs(command_line.stage_flags(), commands[0][2:], ["train"])
    assert configs[TrainConfig].kinds == (kind,)
    if kind == "jumprelu":
        assert configs[TrainConfig].of_kind(kind).target_l0 == (20.0, 30.0)


def test_fused_attention_is_compared_where_there_is_a_kernel(monkeypatch, capsys):
    """XLA stands in for cuDNN; a kernel with another scale is noticed."""
    assert gpu_check.check_attention()
    assert "no fused kernel" in capsys.readouterr().out
    monkeypatch.setattr(fused_attention, "_CUDNN", "xla")
    monkeypatch.setattr(gpu_check, "find_kernel", lambda *_: "cudnn")
    assert gpu_check.check_attention()
    attend_fused = gpu_check.attend_fused
    wrong = lambda kernel, config, *rest: attend_fused(kernel, replace(config, score_scale=0.1), *rest)  # noqa: E731
    monkeypatch.setattr(gpu_check, "attend_fused", wrong)
    assert not gpu_check.check_attention()


@pytest.mark.parametrize(
    ("versions", "capability", "told"),
    [
        ({"nvidia-cublas-cu12": "12.9.1.4"}, "10.0", True),
        ({"nvidia-cublas": "13.1.0.3"}, "12.0", True),
        ({"nvidia-cublas": "13.10.0.3"}, "12.0", False),
        ({"nvidia-cublas-cu12": "12.9.1.4"}, "9.0", False),
        ({}, "10.0", False),
    ],
)
def test_a_version_of_cublas_that_others_warn_of_is_told(versions, capability, told, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_version", lambda package: versions.get(package, ""))
    gpu_check.check_cublas(capability)
    line = capsys.readouterr().out
    assert ("wrong results" in line) == told and all(version in line for version in versions.values())

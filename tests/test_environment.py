"""What a process finds when it starts: which devices it may count on, and compiled programs that are kept."""

import os
import sys
from pathlib import Path

import pytest
import runs

from saejax.runner import command_line, environment
from saejax.settings import CaptureConfig, ModelConfig


@pytest.mark.parametrize(("accelerators", "folder"), [(True, "run/.compile_cache"), (False, None)])
def test_accelerators_keep_programs_in_the_workdir(monkeypatch, tmp_path, accelerators, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: accelerators)
    environment.keep_programs(Path("run"))
    assert os.environ.pop("JAX_COMPILATION_CACHE_DIR", None) == (folder and str(tmp_path / folder))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    environment.keep_programs(Path("run"))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_processors_alone_are_no_accelerators(monkeypatch):
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not environment.may_have_accelerators()
    monkeypatch.delenv("JAX_PLATFORMS")
    assert environment.may_have_accelerators()


@pytest.mark.parametrize(
    ("user_flags", "expected"),
    [
        ("", "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"),
        ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true --xla_gpu_deterministic_ops=true"),
    ],
)
def test_kernels_of_a_gpu(monkeypatch, user_flags, expected):
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", user_flags)
    environment.for_devices(deterministic=True, shares_gpu=False)
    assert os.environ["XLA_FLAGS"] == expected


def test_a_cpu_gets_no_flags_of_gpus(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    environment.for_devices(deterministic=False, shares_gpu=False)
    assert "XLA_FLAGS" not in os.environ


def test_hosts_of_accelerators_keep_many_heaps(monkeypatch):
    calls = []
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: calls.append(name))
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: True)
    environment.keep_freed_memory()
    assert not calls


def test_defaults_do_not_depend_on_the_device(monkeypatch):
    def defaults(*arguments: str) -> tuple[str, str, str]:
        configs = command_line.read_configs(command_line.stage_flags(), ["program", *arguments])
        return configs[ModelConfig].dtype, configs[CaptureConfig].dtype, configs[CaptureConfig].backend

    here = defaults()
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: True)
    assert defaults() == defaults("--preflight.topology=h100:8") == here
    shipped = runs.ROOT / "configs" / "accelerator.flags"
    assert defaults(f"--flagfile={shipped}") == ("bfloat16", "bfloat16", "jax")

"""What a process finds when it starts: which devices it may count on, and compiled programs that are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from saejax import command, command_line, environment
from saejax.settings import CaptureConfig, ModelConfig

_PROGRAM = """
import sys
from pathlib import Path
from saejax import environment
environment.keep_programs(sys.argv[1], Path("run"))
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
seen = []
jax.monitoring.register_event_listener(lambda event, **more: seen.append(event))
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
print(sum(event.endswith("cache_hits") for event in seen))
"""


def test_the_second_start_finds_what_the_first_compiled(tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    hits = [
        int(subprocess.check_output([sys.executable, "-c", _PROGRAM, where], cwd=runs.ROOT, env=variables, text=True))
        for where in (str(tmp_path / "kept"), str(tmp_path / "kept"), "none", "auto")
    ]
    assert hits[0] == 0 and hits[1] > 0 and hits[2:] == [0, 0]
    assert not Path("run").exists()


@pytest.mark.parametrize("there, folder", [(True, "run/.compile_cache"), (False, None)])
def test_accelerators_keep_programs_in_the_workdir(monkeypatch, tmp_path, there, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: there)
    environment.keep_programs("auto", Path("run"))
    found = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    assert found == (folder and str(tmp_path / folder))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    environment.keep_programs("other", Path("run"))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_processors_alone_are_no_accelerators(monkeypatch):
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not environment.may_have_accelerators()
    monkeypatch.delenv("JAX_PLATFORMS")
    assert environment.may_have_accelerators()


@pytest.mark.parametrize(
    "gpu, installed, variables, there",
    [
        (True, "jax_cuda13_plugin", {}, True),
        (True, "jax_cuda12_plugin", dict(CUDA_VISIBLE_DEVICES="0,1"), True),
        (True, "jax_cuda12_plugin", dict(CUDA_VISIBLE_DEVICES=""), False),
        (True, "jax_cuda12_plugin", dict(JAX_PLATFORMS="cpu"), False),
        (True, "", {}, False),
        (False, "jax_cuda12_plugin", {}, False),
        (False, "libtpu", {}, False),
    ],
)
def test_an_accelerator_is_one_that_jax_can_use(monkeypatch, gpu, installed, variables, there):
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: ["/dev/nvidia0"] * gpu)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name == installed)
    monkeypatch.setattr(environment, "_may_have_tpu", lambda: False)
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.has_accelerators() is there


def test_what_is_said_of_a_machine_that_is_not_here_goes_by_its_defaults(capsys):
    def dtypes(*argv: str) -> tuple[str, str, str]:
        found = command_line.read_configs(command_line.stage_flags(), ["program", *argv])
        return found[ModelConfig].dtype, found[CaptureConfig].dtype, found[CaptureConfig].backend

    assert dtypes() == ("float32", "float32", "torch")
    assert dtypes("--preflight.topology=h100:8") == ("bfloat16", "bfloat16", "jax")
    assert dtypes("--preflight.topology=v5e:2x4", "--model.dtype=float32") == ("float32", "bfloat16", "jax")
    assert command.run(["preflight"], "", ["program", "--help"]) == 0
    assert "(default: float32; on GPUs and TPUs bfloat16)" in capsys.readouterr().out

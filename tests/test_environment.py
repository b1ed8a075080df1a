"""What a process finds when it starts: which devices it may count on, and compiled programs that are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from saejax.runner import command_line, environment
from saejax.settings import CaptureConfig, ModelConfig

_PROGRAM = """
import sys
from pathlib import Path
from saejax.runner import environment
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


def test_defaults_do_not_depend_on_the_device(monkeypatch):
    def defaults(*arguments: str) -> tuple[str, str, str]:
        configs = command_line.read_configs(command_line.stage_flags(), ["program", *arguments])
        return configs[ModelConfig].dtype, configs[CaptureConfig].dtype, configs[CaptureConfig].backend

    here = defaults()
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: True)
    assert defaults() == defaults("--preflight.topology=h100:8") == here
    shipped = runs.ROOT / "configs" / "accelerator.flags"
    assert defaults(f"--flagfile={shipped}") == ("bfloat16", "bfloat16", "jax")

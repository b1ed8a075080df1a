"""What a process finds when it starts: which devices it may count on, and compiled programs that are kept."""

import io
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from saejax.activations.settings import CaptureConfig
from saejax.models.settings import ModelConfig
from saejax.runner import command_line, environment


@pytest.mark.parametrize("is_demanded", [True, False])
def test_tests_of_pages_are_skipped_only_where_nobody_demands_a_browser(is_demanded):
    own = dict(PATH="", SAEJAX_NEEDS_CHROMIUM="1" if is_demanded else "")
    command = [sys.executable, "-c", "import browser; print(browser.needs_chromium.args[0], browser.CHROMIUM)"]
    folder = Path(__file__).parent
    said = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(not is_demanded), "None"]


@pytest.mark.parametrize("is_there", [True, False])
def test_ci_demands_tests_of_pages_where_it_can_have_a_browser_and_says_so_elsewhere(tmp_path, is_there):
    """For a user without root. Its steps are not run: the first ``make`` fails."""
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    programs = dict(id="echo 1000", make="echo demanded: $SAEJAX_NEEDS_CHROMIUM; exit 3")
    for name, code in (programs | (dict(chromium="") if is_there else {})).items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    own = dict(PATH=str(tmp_path), SAEJAX_NEEDS_CHROMIUM="", LC_ALL="C")  # of others that are missing bash warns
    command = [shutil.which("bash") or "bash", str(runs.ROOT / ".ci" / "run")]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr == ""
    assert done.stdout == "demanded: 1\n" if is_there else "pages are skipped" in done.stdout


@pytest.mark.parametrize("accelerators", [True, False])
def test_programs_are_kept_in_the_workdir(monkeypatch, tmp_path, accelerators):
    monkeypatch.chdir(tmp_path)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: accelerators)
    environment.keep_programs(Path("run"))
    folder = Path(os.environ.pop("JAX_COMPILATION_CACHE_DIR"))
    of_workdir = tmp_path / "run" / ".compile_cache"
    assert folder == of_workdir if accelerators else folder.parent == of_workdir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    environment.keep_programs(Path("run"))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_programs_of_another_model_of_processor_are_not_read(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: False)
    folders = []
    for machine in ("x86_64", "x86_64", "aarch64"):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setattr(environment.platform, "machine", lambda machine=machine: machine)
        environment.keep_programs(tmp_path)
        folders.append(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert folders[0] == folders[1] != folders[2]


def test_any_text_can_be_printed(monkeypatch):
    """Also where the encoding has few signs, or where standard output is closed."""
    written = io.BytesIO()
    narrow = io.TextIOWrapper(written, "ascii", write_through=True)
    for stream in (narrow, None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "excepthook", sys.__excepthook__)
            environment.for_terminal()
            print("\u2192 \udcff", flush=True)
    assert written.getvalue() == b"\\u2192 \\udcff\n"


def test_ctrl_c_while_libraries_are_loaded_ends_in_a_line():
    program = "from saejax.runner import environment\nenvironment.for_terminal()\nraise KeyboardInterrupt"
    process = subprocess.run([sys.executable, "-c", program], cwd=runs.ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (-signal.SIGINT, "stopped before anything ran\n")


def test_processors_alone_are_no_accelerators_and_get_no_flags(monkeypatch):
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not environment.may_have_accelerators()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    environment.for_devices(deterministic=False, shares_gpu=False)
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.delenv("JAX_PLATFORMS")
    assert environment.may_have_accelerators()


DETERMINISTIC, NO_TRITON = "--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_triton_gemm=false"
TRITON = "--xla_gpu_enable_triton_gemm=true"


def test_kernels_of_a_gpu(monkeypatch):
    """The user's own flags stay."""
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: True)
    for user_flags, expected in (("", f"{DETERMINISTIC} {NO_TRITON}"), (TRITON, f"{TRITON} {DETERMINISTIC}")):
        monkeypatch.setenv("XLA_FLAGS", user_flags)
        environment.for_devices(deterministic=True, shares_gpu=False)
        assert os.environ["XLA_FLAGS"] == expected


FREED = """
import ctypes, resource, threading
from saejax.runner.environment import keep_freed_memory

keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=steps, args=(count,))  # XLA allocates on threads of its own
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def steps(count):
    for _ in range(count):
        block = libc.malloc({size})
        libc.memset(block, 1, {size})
        libc.free(block)

faults(1)
print(faults(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has to be told")
def test_pages_of_large_blocks_are_faulted_in_once():
    """Memory that a step frees stays with the process for the next step."""
    size = 100 * 2**20
    done = subprocess.run([sys.executable, "-c", FREED.format(size=size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.1 * 4 * size / 4096


def test_hosts_of_accelerators_keep_many_heaps(monkeypatch):
    calls = []
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: calls.append(name))
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: True)
    environment.keep_freed_memory()
    assert not calls


def test_defaults_do_not_depend_on_the_device(monkeypatch):
    def defaults(*arguments: str) -> tuple[str, str]:
        configs = command_line.read_configs(command_line.stage_flags(), ["program", *arguments])
        return configs[ModelConfig].dtype, configs[CaptureConfig].dtype

    here = defaults()
    monkeypatch.setattr(environment, "may_have_accelerators", lambda: True)
    assert defaults() == defaults("--preflight.topology=h100:8") == here
    shipped = runs.ROOT / "configs" / "accelerator.flags"
    assert defaults(f"--flagfile={shipped}") == ("bfloat16", "bfloat16")

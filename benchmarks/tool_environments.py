"""Interpreters of environments that have other tools, which benchmarks and tests compare with."""

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent
#: What docs/parity.md was measured with.
SAE_LENS, CIRCUIT_TRACER = "sae-lens==6.54.12", "circuit-tracer==0.5.0"
_TORCH = "torch==2.13.0"  # as constraints.txt pins it: a newer build may need a GPU


def saelens_python() -> str:
    """Return the path of an interpreter with sae-lens; its environment, build/saelens, is made on first use."""
    return _python("saelens", "-c", str(_ROOT / "constraints.txt"), SAE_LENS, _TORCH)


def circuit_tracer_python() -> str:
    """Return the path of an interpreter with circuit-tracer, in build/circuit_tracer; it needs older packages."""
    return _python("circuit_tracer", CIRCUIT_TRACER, _TORCH)


def transformers_folder(version: str) -> str:
    """Return a folder with a version of transformers alone, build/transformers-VERSION, made on first use.

    It goes before others in PYTHONPATH; what transformers needs is this environment's.
    """
    folder = _ROOT / "build" / f"transformers-{version}"
    if not (folder / ".installed").exists():
        package = f"transformers=={version}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([*command, package], check=True)
        (folder / ".installed").touch()
    return str(folder)


def _python(name: str, *packages: str) -> str:
    environment = _ROOT / "build" / name
    python = environment / "bin" / "python"
    if not (environment / ".installed").exists():
        print(f"installing {name} into {environment}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (environment / ".installed").touch()
    return str(python)

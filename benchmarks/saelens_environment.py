"""The interpreter of an environment that has sae-lens, which the benchmarks against it share."""

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent
ENVIRONMENT = _ROOT / "build" / "saelens"


def saelens_python() -> str:
    """Its path; the environment is made on first use."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".installed").exists():
        print(f"installing sae-lens into {ENVIRONMENT}", file=sys.stderr, flush=True)
        constraints = _ROOT / "constraints.txt"  # pins torch, whose newest build may need a GPU
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), "sae-lens", "torch==2.13.0"]
        subprocess.run(install, check=True)
        (ENVIRONMENT / ".installed").touch()
    return str(python)

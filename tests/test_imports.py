"""Imports go one way, and torch stays where it belongs."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from test_structure import loaded_by_name

ROOT = Path(__file__).parent.parent
# A module imports only from what stands to its right. A folder that is not named here
# stands beside the stages.
ORDER = [
    "experiments",
    "studies",
    "serving",
    "preflight",
    "ground_truth",
    "library",
    "report",
    "circuits",
    "matching",
    "interpret",
    "attribution",
    "interventions",
    "training",
    "evaluation",
    "activations",
    "tasks",
    "costs",
    "dictionaries",
    "models",
    "page",
    "runner",
    "files",
    "errors",
    "statistics",
]
# The same inside a package.
INSIDE = {
    "attribution": [
        "stage",
        "run",
        "programs",
        "report",
        "requests",
        "forms",
        "checks",
        "heads",
        "trace",
        "local",
        "results",
        "graph",
    ],
    "parallel": ["mesh", "collectives", "cluster", "processes"],
}
TORCH_MAY_BE_IN = {
    "saejax/activations/torch_capture.py",
    "saejax/models/torch_hooks.py",
    "saejax/models/torch_model.py",
    "saejax/models/source.py",
    "saejax/models/checkpoint.py",
    "saejax/models/model_cache.py",
}
# The runner discovers stages, kinds that plugins add, and whether a model runs in PyTorch.
RUNNER_MAY_IMPORT = {"saejax.stages", "saejax.dictionaries.kinds", "saejax.models.source"}
SOURCES = sorted(p for top in ("saejax", "experiments") for p in (ROOT / top).rglob("*.py"))


@functools.cache
def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = loaded_by_name(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str | None:
    """The part of ORDER that a module name belongs to."""
    pieces = name.split(".")
    if pieces[0] == "experiments":
        return "experiments"
    if pieces[0] != "saejax" or len(pieces) < 2:
        return None
    if pieces[1] in ("settings", "parallel", "results"):
        return "runner"
    return pieces[1] if pieces[1] in ORDER else "stages"


def test_imports_go_one_way():
    wrong = []
    for path in SOURCES:
        own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if path == ROOT / "saejax" / "__init__.py":
            continue
        assert own in (*ORDER, "stages"), f"{path} belongs to no part"
        for name in imported(path):
            target = part(name)
            if own == "runner" and name.startswith(tuple(RUNNER_MAY_IMPORT)):
                continue
            if "stages" in (own, target):  # declarations, which import what does the work when it is called
                continue
            if target in ORDER and target != own and ORDER.index(own) > ORDER.index(target):
                wrong.append(f"{path.relative_to(ROOT)}: {own} must not import {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", INSIDE)
def test_imports_inside_a_package_go_one_way(package):
    order = INSIDE[package]
    for path in (ROOT / "saejax" / package).rglob("*.py"):
        own = path.relative_to(ROOT / "saejax" / package).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imported(path):
            pieces = name.split(".")
            if pieces[:2] == ["saejax", package] and len(pieces) > 2 and pieces[2] != own:
                assert order.index(own) < order.index(pieces[2]), f"{path}: {own} must not import {name}"


def test_torch_is_imported_in_few_places():
    using = {str(p.relative_to(ROOT)) for p in SOURCES if any(name.split(".")[0] == "torch" for name in imported(p))}
    assert using <= TORCH_MAY_BE_IN


def run_and_list(code: str) -> tuple[str, str]:
    """What a program writes, and which large libraries it has imported at the end."""
    large = {"jax", "flax", "orbax", "torch", "transformers", "matplotlib", "numpy"}
    code = f"import sys\ntry:\n    {code}\nfinally:\n    print(sorted({large} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stdout + done.stderr, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("module", ["saejax", "saejax.runner.registry", "saejax.settings"])
def test_importing_is_light(module):
    assert run_and_list(f"import {module}") == ("[]\n", "[]")


@pytest.mark.parametrize(
    ("binary", "flag", "says"),
    [
        ("train", "--help", "--train.jumprelu.bandwidth"),
        ("pipeline", "--help", "--train.jumprelu.bandwidth"),
        ("train", "--train.no_such_flag=1", "error: Unknown command line flag"),
        ("train", "--train.kinds=no_such_kind", "error: --train.kinds is 'no_such_kind': expected one of standard,"),
    ],
)
def test_help_and_bad_flags_are_light(binary, flag, says):
    """Nobody waits for JAX to be told how a program is called."""
    run = f"import runpy; sys.argv[1:] = ['--workdir=nowhere', '{flag}']; "
    written, large = run_and_list(f"{run}runpy.run_module('experiments.{binary}', run_name='__main__')")
    assert says in written and large == "[]"


def test_a_reader_of_the_help_may_leave():
    command = [sys.executable, "-m", "experiments.train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0

"""Imports go one way, and torch stays where it belongs."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from what stands to its right. A stage's folder that is not named here stands behind the
# pipeline: it may import all others, and nothing imports it.
ORDER = [
    "experiments",
    "command",
    "pipeline",
    "preflight",
    "ground_truth",
    "library",
    "report",
    "analysis",
    "attribution",
    "causal",
    "training",
    "evaluation",
    "activations",
    "tasks",
    "costs",
    "dictionaries",
    "models",
    "parallel",
    "reporting",
    "results",
    "rules",
    "workspace",
    "stages",
    "stage",
    "settings",
    "config",
    "errors",
]
# The same inside a package.
INSIDE = {
    "attribution": [
        "stage",
        "run",
        "cost",
        "report",
        "requests",
        "forms",
        "groups",
        "checks",
        "heads",
        "trace",
        "local",
        "results",
        "graph",
    ],
}
TORCH_MAY_BE_IN = {"saejax/activations/torch_capture.py", "saejax/models/source.py", "saejax/models/randomised.py"}
SOURCES = sorted(p for top in ("saejax", "experiments") for p in (ROOT / top).rglob("*.py"))


@functools.cache
def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
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
    return "pipeline" if (ROOT / "saejax" / pieces[1] / "stage.py").exists() and pieces[1] not in ORDER else pieces[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if path == ROOT / "saejax" / "__init__.py":
        return
    assert own in ORDER, f"{path} belongs to no part"
    for name in imported(path):
        target = part(name)
        if target in ORDER and target != own:
            assert ORDER.index(own) < ORDER.index(target), f"{path}: {own} must not import {name}"


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


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_is_imported_in_few_places(path):
    uses = any(name.split(".")[0] == "torch" for name in imported(path))
    assert not uses or str(path.relative_to(ROOT)) in TORCH_MAY_BE_IN


@pytest.mark.parametrize("module", ["saejax", "saejax.stages"])
def test_importing_is_light(module):
    code = f"import sys, {module}; print(sorted({{'jax', 'torch', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )

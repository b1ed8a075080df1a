"""Imports go one way: the library knows no stage, no workdir, no flag and no page; torch stays where it belongs."""

import ast
import functools
import subprocess
import sys
import time

import pytest
from test_structure import PAGES_OF_NOTEBOOKS, ROOT, TREES, import_names, loaded_by_name

# The library's packages. Each may import from those that stand before it. A module directly in saejax/, such as
# saejax/config.py, stands below them all, unless it is named among the shell's.
LIBRARY = [
    *("parallel", "statistics", "models", "dictionaries", "tasks", "activations", "evaluation", "training"),
    *("interventions", "attribution", "circuits", "interpret", "matching", "ground_truth"),
]
SHELL = ["cli", "costs", "page", "preflight", "runner", "serving", "stages", "studies"]
# The same inside a package.
INSIDE = dict(
    attribution="stage programs requests forms checks heads trace local results graph settings",
    parallel="mesh collectives cluster stopping processes gpus settings",
)
WITH_TORCH = "torch_devices torch_hooks torch_model source checkpoint model_cache"
TORCH_MAY_BE_IN = {"saejax.activations.torch_capture", "saejax.interpret.jacobian_lens"} | {
    f"saejax.models.{name}" for name in WITH_TORCH.split()
}
# Loaded where they are used: torch and transformers, what an extra installs, and what would take seconds of --help.
LAZY = "torch transformers wandb gguf accelerate openai starlette uvicorn datasets sklearn pandas"


@functools.cache
def imports() -> dict[str, set[str]]:
    """What each module imports, wherever in it."""
    return {module: import_names(tree) for module, tree in TREES.items()}


def part(name: str) -> str:
    """The package of saejax that a module belongs to, or the module directly in saejax/; "" of other libraries."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "saejax" and len(pieces) > 1 else ""


@functools.cache
def at_the_top(tree: ast.Module) -> set[str]:
    """The modules that a file imports when it is loaded, those for type checkers left out."""
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    return import_names(tree, [node for node in ast.walk(tree) if node not in lazy]) - loaded_by_name(tree)


def test_every_part_is_named():
    folders = {path.name for path in (ROOT / "saejax").iterdir() if (path / "__init__.py").exists()}
    assert folders == {*LIBRARY, *SHELL} - {"cli"}


def test_the_library_knows_no_stage_workdir_flag_or_page():
    wrong = []
    for module, tree in TREES.items():
        if module == "saejax" or part(module) in ("", *SHELL):
            continue
        names = at_the_top(tree) if module in PAGES_OF_NOTEBOOKS else imports()[module]
        wrong += [f"{module} imports {name}" for name in names if part(name) in SHELL]
        wrong += [f"{module} imports {name}" for name in names if name.split(".")[0] == "absl" and "flags" in name]
    assert not wrong, "\n".join(sorted(wrong))


def test_packages_of_the_library_import_one_way():
    wrong = []
    for module in TREES:
        if part(module) not in LIBRARY:
            continue
        above = LIBRARY[LIBRARY.index(part(module)) + 1 :]
        wrong += [f"{module} imports {name}" for name in imports()[module] if part(name) in above]
    assert not wrong, "\n".join(sorted(wrong))


def test_imports_inside_a_package_go_one_way():
    for package, names in INSIDE.items():
        order = names.split()
        for module in (module for module in imports() if module.startswith(f"saejax.{package}.")):
            source = module.split(".")[2]
            for pieces in (name.split(".") for name in imports()[module]):
                if pieces[:2] == ["saejax", package] and len(pieces) > 2 and pieces[2] != source:
                    assert order.index(source) < order.index(pieces[2]), f"{module} must not import {pieces}"


def test_imports_are_ordinary():
    """The package's own modules are imported at the top of a file; heavy libraries where they are used."""
    lazy = {*TORCH_MAY_BE_IN, "saejax.serving.app"}
    wrong = []
    for module, tree in TREES.items():
        if module not in {"saejax", *PAGES_OF_NOTEBOOKS, *lazy}:
            inside = {name for name in imports()[module] - at_the_top(tree) if part(name) and name not in lazy}
            conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)] if inside else []
            typed = import_names(tree, [inner for node in conditions for inner in ast.walk(node)])
            wrong += [f"{module} imports {name} inside" for name in inside - typed]
        if module not in lazy:
            wrong += [f"{module} loads {name}" for name in at_the_top(tree) if name.split(".")[0] in LAZY.split()]
    assert not wrong, "\n".join(sorted(wrong))


def test_torch_is_imported_in_few_places():
    using = {module for module, names in imports().items() if any(name.split(".")[0] == "torch" for name in names)}
    assert using <= TORCH_MAY_BE_IN


LIGHT = """
import runpy, sys
for call in ("train --help", "pipeline --help", "train --train.no_such_flag=1", "train --train.kinds=none"):
    binary, flag = call.split()
    sys.argv = [binary, "--workdir=nowhere", flag]
    try:
        runpy.run_module(f"experiments.{binary}", run_name="__main__")
    except SystemExit:
        pass
import jax
from jax._src import xla_bridge
print(sorted(set({lazy!r}.split()) & set(sys.modules)), xla_bridge.backends_are_initialized())
"""


def test_help_and_bad_flags_load_no_heavy_library_and_start_no_device():
    began = time.monotonic()
    script = LIGHT.replace("{lazy!r}", repr(LAZY))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    print(f"help of two programs and two refusals in one process: {time.monotonic() - began:.1f} s")
    assert done.stdout.splitlines()[-1] == "[] False", done
    assert done.stdout.count("\n  --train.jumprelu.bandwidth") == 2
    unknown, wrong = done.stderr.splitlines()
    assert unknown.startswith("error: Unknown command line flag")
    assert wrong.startswith("error: --train.kinds is 'none': expected one of standard,")


@pytest.mark.slow  # the call that shows it is tested in test_bad_input.py
def test_a_reader_of_the_help_may_leave():
    command = [sys.executable, "-m", "experiments.train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0

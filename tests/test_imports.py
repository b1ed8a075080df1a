"""Imports go one way, and torch stays where it belongs."""

import subprocess
import sys

from test_structure import ROOT, TREES, import_names

# A module imports only from what stands to its right. A folder that is not named here stands beside the stages.
PARTS = (
    "experiments studies serving preflight ground_truth library report circuits matching interpret attribution "
    "interventions training evaluation activations tasks costs dictionaries models page runner files errors "
    "unicode statistics"
)
ORDER = PARTS.split()
# The same inside a package.
INSIDE = dict(
    attribution="stage run programs report requests forms checks heads trace local results graph",
    parallel="mesh collectives cluster processes",
)
WITH_TORCH = "torch_hooks torch_model source checkpoint model_cache"
TORCH_MAY_BE_IN = {"saejax.activations.torch_capture"} | {f"saejax.models.{name}" for name in WITH_TORCH.split()}
# The runner discovers stages, kinds that plugins add, and whether a model runs in PyTorch.
RUNNER_MAY_IMPORT = ("saejax.stages", "saejax.dictionaries.kinds", "saejax.models.source")
IMPORTS = {module: import_names(tree) for module, tree in TREES.items()}


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
    for module in IMPORTS.keys() - {"saejax"}:
        source = part(module)
        assert source in (*ORDER, "stages"), f"{module} belongs to no part"
        for name in IMPORTS[module]:
            target = part(name)
            if source == "runner" and name.startswith(RUNNER_MAY_IMPORT):
                continue
            if "stages" in (source, target):  # declarations, which import what does the work when it is called
                continue
            if target in ORDER and ORDER.index(source) > ORDER.index(target):
                wrong.append(f"{module}: {source} must not import {name}")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_a_package_go_one_way():
    for package, names in INSIDE.items():
        order = names.split()
        for module in (module for module in IMPORTS if module.startswith(f"saejax.{package}.")):
            source = module.split(".")[2]
            for pieces in (name.split(".") for name in IMPORTS[module]):
                if pieces[:2] == ["saejax", package] and len(pieces) > 2 and pieces[2] != source:
                    assert order.index(source) < order.index(pieces[2]), f"{module} must not import {pieces}"


def test_torch_is_imported_in_few_places():
    using = {module for module, names in IMPORTS.items() if any(name.split(".")[0] == "torch" for name in names)}
    assert using <= TORCH_MAY_BE_IN


LIGHT = """
import runpy, sys
import saejax, saejax.runner.registry, saejax.settings
print("imported")
for call in ("train --help", "pipeline --help", "train --train.no_such_flag=1", "train --train.kinds=none"):
    binary, flag = call.split()
    sys.argv = [binary, "--workdir=nowhere", flag]
    try:
        runpy.run_module(f"experiments.{binary}", run_name="__main__")
    except SystemExit:
        pass
print(sorted({"jax", "flax", "orbax", "torch", "transformers", "matplotlib", "numpy"} & set(sys.modules)))
"""


def test_imports_help_and_bad_flags_are_light():
    """Nobody waits for JAX to be told how a program is called."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[0] == "imported" and lines[-1] == "[]", done
    assert done.stdout.count("\n  --train.jumprelu.bandwidth") == 2
    unknown, wrong = done.stderr.splitlines()
    assert unknown.startswith("error: Unknown command line flag")
    assert wrong.startswith("error: --train.kinds is 'none': expected one of standard,")


def test_a_reader_of_the_help_may_leave():
    command = [sys.executable, "-m", "experiments.train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0

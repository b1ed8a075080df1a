"""Stages are found beside their code, in an order that follows from what they wait for; the page adds one."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
import typing

import pytest
import runs

from saejax.runner.registry import STAGES, default_configs, sort_stages
from saejax.runner.stage import Stage
from saejax.runner.workplan import Workplan
from saejax.settings import ModelConfig

PAGE = (runs.ROOT / "docs" / "extending.md").read_text()
FILES = ("saejax/stages/lengths.py", "experiments/lengths.py")


def stage(name: str, *after: str, **more) -> Stage:
    return Stage(name=name, summary="", run=print, groups=(ModelConfig,), reads=after, **more)


def test_the_order_follows_from_what_stages_wait_for():
    made = [stage("last", "*"), stage("b", "c"), stage("a", "b"), stage("c"), stage("check", first=True)]
    assert list(sort_stages(made)) == ["check", "c", "b", "a", "last"]
    for wrong in ([stage("a", "b"), stage("b", "a")], [stage("a", "nothing")]):
        with pytest.raises(ValueError, match=r"wait for each other, or for one that does not exist: \['a'"):
            sort_stages(wrong)


def test_every_stage_comes_after_those_whose_units_it_reads():
    configs = default_configs()
    asked = dict(graph=dict(prompt="a", transcoders="set"), study=dict(benchmarks=("logic",)))
    asked |= dict(
        truth=dict(features=64), patch=dict(kinds=("mlp_out",), dictionary="topk"), probe=dict(labels=("answer",))
    )
    asked |= dict(steer=dict(dictionary="topk"))
    asked |= dict(
        interpret=dict(dictionaries=("topk",)),
        export=dict(dictionaries=("topk",)),
        transfer=dict(dictionaries=("topk",)),
        cluster=dict(dictionaries=("topk",)),
        explain=dict(dictionaries=("topk",), url="http://localhost/v1", model="m"),
        track=dict(prompt="a", dictionaries=("topk",)),
        known=dict(circuits=("chain",)),
        circuits=dict(behaviours=("capital",)),
        algorithm=dict(names=("addition",)),
        task=dict(benchmarks=("gsm8k",)),
        corpus=dict(stream=True),
    )
    for group, changes in asked.items():
        configs |= dataclasses.replace(configs.named(group), **changes)
    order = list(STAGES)
    for name, declared in STAGES.items():
        names = declared.names(configs)
        assert names, f"{name} has no unit here"
        for need in (need for unit in names for need in declared.needs(configs, unit)):
            assert order.index(need.partition("/")[0]) < order.index(name), f"{name} reads {need}"


def imports_inside(function) -> list[tuple[str, str]]:
    """The modules and names that a function imports when it is called."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.name) for node in nodes for alias in node.names]


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_imports_when_it_runs_exists(name):
    declared = STAGES[name]
    if declared.results:
        classes = typing.get_args(declared.results()) or (declared.results(),)
        assert all(map(dataclasses.is_dataclass, classes))
    for function in (declared.run, declared.section, declared.rule):
        for module, name in imports_inside(function) if function else ():
            assert hasattr(importlib.import_module(module), name), (module, name)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package, with the page's stage in it."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("saejax", "experiments"):
        shutil.copytree(runs.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path for path in root.rglob("*") if path.is_file()}
    for file in FILES:
        (code,) = re.findall(rf"```python\n# {re.escape(file)}\n(.*?)```", PAGE, re.S)
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(code)
    assert {path for path in root.rglob("*") if path.is_file()} - before == {root / file for file in FILES}
    return root


def run(copy, code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_stage_of_the_page(copy, inputs, tmp_path):
    flags = [*runs.small_flags(*inputs, tmp_path), "--lengths.share=1"]
    binary = subprocess.run(
        [sys.executable, "-m", "experiments.lengths", *flags], cwd=copy, capture_output=True, text=True
    )
    assert binary.returncode == 0, binary.stderr
    results = json.loads((tmp_path / "lengths" / "done.json").read_text())["results"]
    assert results["documents"] == 40 and 20 < results["tokens"] < 200
    again = run(copy, _AGAIN, *flags)
    assert "lengths: done before, unchanged" in again and "lengths: started" in again
    assert "--lengths.share" in again and "3 documents, at most 7 tokens" in again


# Runs of the stage in a process that has the page's files, and its part of the report.
_AGAIN = """
import contextlib, sys, types
from saejax.runner import command
from saejax.runner.registry import STAGES, default_configs
assert command.run(["preflight", "lengths"], "", sys.argv) == 0
with contextlib.suppress(SystemExit):
    command.run(["lengths"], "", ["lengths", "--help"])
assert command.run(["lengths"], "", [*sys.argv, "--lengths.share=0.5"]) == 0
assert list(STAGES)[-1] == "report" and "lengths" in STAGES["report"].needs(default_configs(), "")
(section,) = STAGES["lengths"].section(types.SimpleNamespace(first=lambda cls: cls(3, 7.0)), None)
print(section.title, section.blocks[0])
"""


def test_a_new_revision_of_a_stage_makes_its_units_and_those_that_read_them_anew(monkeypatch):
    configs = default_configs()
    units = ("capture", "train/topk", "evaluate/topk")
    before = [Workplan(configs).fingerprint(unit) for unit in units]
    monkeypatch.setitem(STAGES, "train", dataclasses.replace(STAGES["train"], revision=7))
    after = [Workplan(configs).fingerprint(unit) for unit in units]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]

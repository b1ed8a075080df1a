"""Stages are found beside their code, in an order that follows from what they wait for; the page adds one."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
import runs

from saejax.models.settings import ModelConfig
from saejax.runner.registry import all_stages, default_configs, sort_stages
from saejax.runner.stage import Stage
from saejax.runner.workplan import Workplan

PAGE = (runs.ROOT / "docs" / "extending.md").read_text()


def stage(name: str, *after: str, **more) -> Stage:
    return Stage(name=name, summary="", run=print, groups=(ModelConfig,), reads=after, **more)


def test_the_order_follows_from_what_stages_wait_for():
    stages = [stage("last", "*"), stage("b", "c"), stage("a", "b"), stage("c"), stage("check", first=True)]
    assert list(sort_stages(stages)) == ["check", "c", "b", "a", "last"]
    for wrong in ([stage("a", "b"), stage("b", "a")], [stage("a", "nothing")]):
        with pytest.raises(ValueError, match=r"wait for each other, or for one that does not exist: \['a'"):
            sort_stages(wrong)


# The binary, and runs of the stage and its part of the report, all in a process that has the page's files.
CALLS = """
import contextlib, runpy, sys, types
from saejax.runner import command
from saejax.runner.registry import all_stages, default_configs
assert command.run(["lengths"], "", [*sys.argv, "--lengths.share=0.5"]) == 0
with contextlib.suppress(SystemExit):
    runpy.run_module("experiments.lengths", run_name="__main__")
assert command.run(["preflight", "lengths"], "", sys.argv) == 0
command.run(["lengths"], "", ["lengths", "--help"])
assert list(all_stages())[-1] == "report" and "lengths" in all_stages()["report"].needs(default_configs(), "")
(section,) = all_stages()["lengths"].section(types.SimpleNamespace(first=lambda cls: cls(3, 7.0)), None)
print(section.title, section.blocks[0])
"""


def test_the_stage_of_the_page(inputs, tmp_path):
    root, workdir = tmp_path / "copy", tmp_path / "run"
    for folder in ("saejax", "experiments"):
        shutil.copytree(runs.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("saejax/stages/lengths.py", "experiments/lengths.py"):
        assert not (root / file).exists()
        (code,) = re.findall(rf"```python\n# {re.escape(file)}\n(.*?)```", PAGE, re.S)
        (root / file).write_text(code)
    flags = runs.small_flags(*inputs, workdir, task__behaviours="", train__kinds="topk")  # for a quick preflight
    command = [sys.executable, "-c", CALLS, *flags, "--lengths.share=1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((workdir / "lengths" / "done.json").read_text())["results"]
    assert results["documents"] == 40 and 20 < results["tokens"] < 200
    assert "lengths: done before, unchanged" in done.stdout and done.stdout.count("lengths: started") == 2
    assert "--lengths.share" in done.stdout and "3 documents, at most 7 tokens" in done.stdout


def test_a_new_revision_of_a_stage_makes_its_units_and_those_that_read_them_anew(monkeypatch):
    configs = default_configs()
    units = ("capture", "train/topk", "evaluate/topk")
    before = [Workplan(configs).fingerprint(unit) for unit in units]
    monkeypatch.setitem(all_stages(), "train", dataclasses.replace(all_stages()["train"], revision=7))
    after = [Workplan(configs).fingerprint(unit) for unit in units]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]

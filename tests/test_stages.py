"""Stages are found beside their code, in an order that follows from what they wait for; the page adds one."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import runs

from saejax import cli
from saejax.errors import UserError
from saejax.models.settings import ModelConfig
from saejax.runner import plugins, registry
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


@pytest.fixture
def no_plugins(monkeypatch):
    """Forgets the stages of plugins afterwards."""
    monkeypatch.setattr(registry, "_ADDED", {})
    yield
    monkeypatch.undo()
    all_stages.cache_clear()
    registry.all_groups.cache_clear()


def test_the_stage_of_the_page_is_a_plugin(inputs, tmp_path, no_plugins, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n# lengths\.py\n(.*?)```", PAGE, re.S)
    (tmp_path / "lengths.py").write_text(code)
    workdir = tmp_path / "run"
    flags = runs.small_flags(*inputs, workdir, task__behaviours="", train__kinds="topk")  # for a quick preflight
    flags += [f"--plugins={tmp_path}/lengths.py", "--lengths.share=1"]

    def call(program, *more, status=0):
        monkeypatch.setattr(sys, "argv", ["saejax", program, *flags, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = "".join(capsys.readouterr())
        assert ended.value.code == status, said
        return said

    command = [sys.executable, "-m", "saejax.cli", "lengths", *flags]
    assert "lengths: started" in subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True).stdout
    assert "lengths: done before, unchanged" in call("lengths")
    assert "--plugins=FILE adds others) 'lenghts'" in call("lenghts", status=2)
    assert "the flag file none.flags cannot be read" in call("lengths", "--flagfile=none.flags", status=2)
    results = json.loads((workdir / "lengths" / "done.json").read_text())["results"]
    assert results["documents"] == 40 and 20 < results["tokens"] < 200
    assert "--lengths.share was 1.0, is 0.5" in call("lengths", "--lengths.share=0.5")
    (tmp_path / "lengths.py").write_text(code + "\n# changed\n")
    assert "lengths: started" in call("lengths")
    assert "--lengths.share belongs to the stage lengths" in call("capture", status=2)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "adds nothing: decorate the class of a kind"),
        ('Stage(name="capture", summary="", run=print, groups=())', "declares the stage capture, which saejax has"),
        ('Stage(name="mine", summary="", run=print, groups=(TrainConfig,))', "has settings TrainConfig, whose flags"),
        ('Stage(name="runs", summary="", run=print, groups=())', "declares the stage runs, which saejax has"),
        ('Stage(name="a/b", summary="", run=print, groups=())', "the stage 'a/b', which names a folder: use letters"),
        (
            'Stage(name="other", summary="", run=print, groups=(), reads=("none",))',
            "stages wait for each other, or for one that does not exist: .*other",
        ),
    ],
)
def test_a_plugin_that_adds_nothing_or_takes_a_name_is_refused(tmp_path, code, message):
    head = """
from dataclasses import dataclass
from saejax.config import Config
from saejax.runner.stage import Stage

@dataclass(frozen=True)
class TrainConfig(Config):
    pass
"""
    (tmp_path / "plugin.py").write_text(head + (f"STAGE = {code}" if code else ""))
    with pytest.raises(UserError, match=message):
        plugins.load([tmp_path / "plugin.py"])
    assert not {"mine", "a/b", "other"} & {*all_stages()}
    assert {cli.PIPELINE, *cli.OTHERS} <= {*plugins.TAKEN}


def test_a_new_revision_of_a_stage_makes_its_units_and_those_that_read_them_anew(monkeypatch):
    configs = default_configs()
    units = ("capture", "train/topk", "evaluate/topk")
    before = [Workplan(configs).fingerprint(unit) for unit in units]
    monkeypatch.setitem(all_stages(), "train", dataclasses.replace(all_stages()["train"], revision=7))
    after = [Workplan(configs).fingerprint(unit) for unit in units]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]

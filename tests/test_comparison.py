"""What differs between two workdirs: settings, figures, verdicts; intervals apart or not; bad input."""

import json
import shutil

import pytest
from obstore.store import MemoryStore

from saejax import comparison
from saejax.buckets import bucket
from saejax.files import write_json
from saejax.workspace import SUMMARY, Workspace


@pytest.fixture(scope="module")
def first(tmp_path_factory, made_up):
    return made_up(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def made_up():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent / "report"))
    from made_up_workspace import make_workspace

    def make(root):
        make_workspace(root)
        return root / "inputs"

    yield make
    sys.path.pop(0)


@pytest.fixture
def second(first, tmp_path):
    return shutil.copytree(first, tmp_path / "second")


def change(folder, unit, edit):
    path = folder / unit / SUMMARY
    summary = json.loads(path.read_text())
    edit(summary)
    write_json(path, summary)


def test_a_workdir_is_the_same_as_itself(first, second):
    assert {one.state for one in comparison.compare(first, second)} == {"same"}


def test_what_changed_is_found_and_nothing_else(first, second, tmp_path, capsys):
    def edit(summary):
        summary["config"]["ablate"]["top"] = 9
        summary["packages"]["jax"] = "9.9"
        summary["seconds"] = 99.0
        capital = summary["results"]["verdict"]["dictionaries"]["tested"]["capital"]
        capital["random"]["answer"], capital["placebo"]["answer"] = "not testable", "no"
        capital["ablation"]["logit_diff"]["effect"] = dict(mean=0.1, low=0.0, high=0.2)
        capital["random"]["effect"]["low"] -= 0.1
        capital["placebo"]["numbers"]["mean"] *= 2

    change(second, "ablate/topk", edit)
    shutil.rmtree(second / "evaluate" / "standard")
    found = {one.unit: one for one in comparison.compare(first, second)}
    assert found["evaluate/standard"].state == "only in the first"
    assert {name for name, one in found.items() if one.state == "changed"} == {"ablate/topk"}
    told = [(one.kind, one.name, one.apart) for one in found["ablate/topk"].changes]
    before = "verdict.dictionaries.tested.capital."
    assert told == [
        ("setting", "ablate.top", None),
        ("package", "jax", None),
        ("verdict", f"{before}random.answer", None),
        ("verdict", f"{before}placebo.answer", None),
        ("figure", f"{before}ablation.logit_diff.effect", True),
        ("figure", f"{before}placebo.numbers.mean", None),
        ("figure", f"{before}random.effect", False),
    ]
    argv = ["compare", str(first), str(second), "--lines=1", f"--out={tmp_path / 'out'}"]
    assert comparison.run(argv) == 0
    shown = capsys.readouterr().out
    assert "setting  ablate.top" in shown and "0.1 [0, 0.2]" in shown and "apart" in shown
    assert "  and 2 figures more" in shown
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert sum(len(unit["changes"]) for unit in written["units"]) == len(told)
    assert "ablate/topk" in (tmp_path / "out" / "index.html").read_text()


def test_workdirs_in_buckets(first, second, tmp_path, monkeypatch, capsys):
    stores = {}
    monkeypatch.setattr(bucket, "_opened", lambda url: stores.setdefault(url, MemoryStore()))
    for url, files in (("s3://runs/a", first), ("s3://runs/empty", tmp_path / "nothing")):
        files.mkdir(exist_ok=True)
        with Workspace(url, str(tmp_path / url[-1])).lock():
            shutil.copytree(files, tmp_path / url[-1], dirs_exist_ok=True)
            (tmp_path / url[-1] / "note.txt").touch()
    change(second, "ablate/topk", lambda summary: summary["packages"].update(jax="9.9"))
    assert comparison.run(["compare", "s3://runs/a", str(second)]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": same") > 3 and "ablate/topk: changed\n  package  jax" in shown
    for url, why in (("s3://runs/a/train", "is no workdir of saejax"), ("s3://runs/empty", "no finished unit")):
        assert comparison.run(["compare", url, str(second)]) == 2
        assert f"error: {url}" in (said := capsys.readouterr().err) and why in said


def test_a_unit_alone_can_be_compared(first, second):
    (one,) = comparison.compare(first / "ablate" / "topk", second / "ablate" / "topk")
    assert one.state == "same"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: [], "compare takes two folders, got 0"),
        (lambda root: ["nowhere", root], "there is no folder nowhere"),
        (lambda root: [root / "empty", root], "holds no finished unit"),
        (lambda root: [root / "broken", root / "broken"], "is not valid JSON"),
    ],
)
def test_bad_input(tmp_path, capsys, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "train").mkdir(parents=True)
    (tmp_path / "broken" / "train" / SUMMARY).write_text("{")
    assert comparison.run(["compare", *map(str, make(tmp_path))]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]

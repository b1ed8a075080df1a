"""What differs between two workdirs: settings, versions and figures; intervals apart or not; bad input."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from saejax import comparison
from saejax.files import write_json
from saejax.runner.workspace import STARTED, SUMMARY


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parent / "report"))
    from made_up_workspace import make_workspace

    root = tmp_path_factory.mktemp("first")
    make_workspace(root)
    sys.path.pop(0)
    for folder in [path.parent for path in sorted((root / "inputs").rglob(SUMMARY))]:
        write_json(folder / STARTED, dict(fingerprint="m"))
        folder.rename(folder.with_name(folder.name + "-m"))
        folder.symlink_to(folder.name + "-m")
    return root / "inputs"


@pytest.fixture
def second(first, tmp_path):
    return shutil.copytree(first, tmp_path / "second", symlinks=True)


def test_a_workdir_is_the_same_as_itself(first, second):
    lines = list(comparison.compare(first, second))
    assert len(lines) > 3 and all(line.endswith(": same") for line in lines)


def test_what_changed_is_found_and_nothing_else(first, second, capsys):
    path = second / "ablate/topk" / SUMMARY
    summary = json.loads(path.read_text())
    summary["config"]["ablate"]["top"] = 9
    summary["packages"]["jax"] = "9.9"
    summary["seconds"] = 99.0
    capital = summary["results"]["verdict"]["dictionaries"]["tested"]["capital"]
    capital["ablation"]["logit_diff"]["effect"] = dict(mean=0.1, low=0.0, high=0.2)
    capital["random"]["answer"] = "not testable"
    capital["random"]["effect"]["low"] -= 0.1
    write_json(path, summary)
    (second / "evaluate" / "standard").unlink()
    assert comparison.run(["compare", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"evaluate/standard: only in {first}" in lines
    changed = lines.index("ablate/topk: changed")
    names = [line.strip().partition(": ")[0] for line in lines[changed + 1 : changed + 6]]
    before = "results.verdict.dictionaries.tested.capital."
    results = [f"{before}{name}" for name in ("ablation.logit_diff.effect", "random.answer", "random.effect")]
    assert names[:2] == ["settings.ablate.top", "packages.jax"] and sorted(names[2:]) == results
    text = "\n".join(lines[changed:])
    assert "-> 0.1 [0, 0.2], intervals apart" in text and "intervals overlap" in text and "-> not testable" in text
    assert sum(line.endswith(": changed") for line in lines) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: [], "compare takes two folders, got 0"),
        (lambda root: ["nowhere", root], "there is no folder nowhere"),
        (lambda root: [root, root], "holds no finished unit"),
    ],
)
def test_bad_input(tmp_path, capsys, make, message):
    assert comparison.run(["compare", *map(str, make(tmp_path))]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]

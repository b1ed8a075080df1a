"""A behaviour of one's own on a dictionary that is there: nothing is captured or trained again."""

import json
import re

import pytest
import runs

from saejax.runner import command
from saejax.runner.results import load_results
from saejax.runner.workspace import current_units

pytestmark = pytest.mark.usefixtures("single_device")


def go(stages, inputs, workdir, **changes):
    small = dict(train__epochs=1, causal__random_sets=2, ablate__baselines="", ablate__untrained_dictionaries=0)
    changes = dict(train__kinds="topk") | small | changes
    return command.run(stages, "", ["program", *runs.small_flags(*inputs, workdir, **changes)])


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A workdir with a dictionary, in which a behaviour that was not thought of is added and tested."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert go(["baseline", "capture", "train"], inputs, workdir) == 0
    before = [(workdir / unit / "done.json").read_text() for unit in ("capture", "train/topk")]
    lines = [
        dict(behaviour="colour", text=f"The {thing} is painted", correct=" red", wrong=" blue", template=thing[0])
        for thing in ("door", "boat", "wall", "fence", "chair", "table", "house")
    ]
    lines = [line | dict(counterpart=line["text"].replace(" is ", " are ")) for line in lines]
    (workdir.parent / "colour.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = dict(task__prompts=workdir.parent / "colour.jsonl", task__behaviours="")
    assert go(["baseline", "capture", "train", "ablate"], inputs, workdir, **changes) == 0
    assert before == [(workdir / unit / "done.json").read_text() for unit in ("capture", "train/topk")]
    assert list(load_results(workdir, "ablate/topk").top) == ["colour"]
    return workdir


def test_a_fresh_workdir_needs_the_folder_alone(inputs, trained, tmp_path):
    workdir, folder = tmp_path / "fresh", trained / "train" / "topk"
    asked = dict(task__prompts=trained.parent / "colour.jsonl", task__behaviours="", ablate__dictionary=folder)
    assert go(["baseline", "ablate"], inputs, workdir, **asked) == 0
    units = {name.partition("/")[0]: folder for name, folder in current_units(workdir).items()}
    assert sorted(units) == ["ablate", "baseline"]
    unit = units["ablate"]
    assert load_results(unit).dictionary == str(folder)
    # The same as by name where it was trained.
    assert load_results(trained, "ablate/topk").verdict == load_results(unit).verdict
    # The report tells of the dictionary what is told where it was trained: nothing before it is evaluated there.
    for evaluated in (False, True):
        assert not evaluated or go(["evaluate"], inputs, trained) == 0
        assert go(["report"], inputs, workdir, **asked) == 0
        assert ("The dictionaries" in (workdir / "report" / "report.md").read_text()) == evaluated
        assert any(load_results(workdir, "report").contexts.values()) == evaluated


@pytest.mark.parametrize(
    ("folder", "why"), [("nowhere/at/all", "=.* does not exist"), ("train", ": .* holds no dictionary")]
)
def test_a_folder_without_a_dictionary(inputs, trained, tmp_path, capsys, folder, why):
    changes = dict(ablate__dictionary=trained / folder, task__behaviours="agreement")
    assert go(["baseline", "ablate"], inputs, tmp_path / "run", **changes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: --ablate.dictionary{why}", line)
    assert not list((tmp_path / "run" / "ablate").rglob("done.json"))

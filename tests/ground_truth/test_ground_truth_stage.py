"""The stage ground_truth: resumed with the same bits, reported, and refused in one line."""

import itertools
import json

import pytest
import runs
import settings_read

from saejax import load_results
from saejax.ground_truth.results import FoundFeatures, JudgedDictionary
from saejax.results import Interval
from saejax.runner import command
from saejax.stages.ground_truth.report import line

pytestmark = pytest.mark.usefixtures("two_devices")

FLAGS = (
    "--task.behaviours= --truth.features=32 --truth.dimensions=16 --truth.samples=2000 --truth.held_out=1000 "
    "--truth.roots=2 --truth.depth=1 --truth.rates=0.2,0.02 "
    "--train.kinds=batchtopk --train.expansion=2 --train.k=2 --train.batch=200 --train.epochs=3 --train.seed=0,1 "
    "--mesh.data=2"
)


def run(stage, workdir, **changes):
    changed = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    flags = runs.flag_file([*FLAGS.split(), *changed], workdir.parent)
    return command.run([stage], "", ["program", f"--workdir={workdir}", flags])


def dictionaries(workdir):
    """What stands for the bits of every dictionary: the checksums of its arrays; and its scores."""
    paths = sorted(workdir.glob("ground_truth/**/dictionary.json"))
    scores = {path.parent: path.read_text() for path in workdir.glob("ground_truth/**/scores.json")}
    arrays = {path.parent.parent: json.loads(path.read_text())["arrays"] for path in paths}
    return {str(path.relative_to(workdir)): (arrays[path], scores[path]) for path in arrays}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("truth")
    assert run("ground_truth", workdir) == 0
    return workdir


@pytest.mark.parametrize("moments", [(9,), pytest.param((9, 17), marks=pytest.mark.slow)])
def test_stopped_anywhere_it_ends_with_the_same_bits(whole, tmp_path, monkeypatch, capsys, moments):
    for asked_at in moments:  # checks for a request to stop, of which there is one at each step
        checks = itertools.count()
        monkeypatch.setattr(
            command, "install_signal_handlers", lambda checks=checks, at=asked_at: lambda: next(checks) >= at
        )
        assert run("ground_truth", tmp_path) == 143 and "saved" in capsys.readouterr().err
    monkeypatch.setattr(command, "install_signal_handlers", lambda: lambda: False)
    assert run("ground_truth", tmp_path) == 0
    assert dictionaries(tmp_path) == dictionaries(whole) and len(dictionaries(whole)) == 4
    capsys.readouterr()
    assert run("ground_truth", tmp_path) == 0 and capsys.readouterr().out.count("done before, unchanged") == 2


def test_a_dictionary_of_another_world_is_not_started_from(whole, tmp_path, capsys):
    seed0 = whole / "ground_truth" / "batchtopk" / "seed0"
    assert run("ground_truth", tmp_path / "other", truth__seed=43, train__init_from=seed0, train__seed="0") == 2
    assert "the dictionary does not fit: model is synthetic (" in capsys.readouterr().err


def test_results_and_report(whole):
    results = load_results(whole / "ground_truth" / "batchtopk")
    assert results.kind == "batchtopk" and results.samples == 6000 and results.features == 32
    (trained,) = results.dictionaries
    scores = [json.loads((whole / f"ground_truth/batchtopk/seed{seed}/scores.json").read_text()) for seed in (0, 1)]
    assert trained.scores.mcc.mean == pytest.approx((scores[0]["mcc"] + scores[1]["mcc"]) / 2)
    assert trained.seeds == (0, 1)
    controls = load_results(whole / "ground_truth" / "controls")
    assert [each.control for each in controls.dictionaries] == ["frozen"]
    assert run("report", whole) == 0
    page = (whole / "report" / "report.md").read_text()
    assert "Does training recover known features?" in page
    assert "random decoder" in page and "best possible" in page


def test_verdict():
    def judged(recovered, control=""):
        rest = {name: Interval(0.5, 0.4, 0.6) for name in FoundFeatures.__dataclass_fields__ if name != "recovered"}
        return JudgedDictionary("", control, (0, 1), FoundFeatures(Interval(recovered, 0, 1), **rest))

    assert "YES" in line([("topk", judged(0.95)), ("standard", judged(0.2)), ("frozen", judged(0.1, "frozen"))])
    assert "NO" in line([("topk", judged(0.8)), ("frozen", judged(0.1, "frozen"))])
    assert "NO" in line([("topk", judged(0.92)), ("frozen", judged(0.93, "frozen"))])


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("ground_truth", dict(truth__rates="1,0.9"), "more than --truth.dimensions=16"),
        ("ground_truth", dict(truth__rates="0.2,0.4"), "--truth.rates=0.2,0.4: expected the first feature's rate"),
        ("ground_truth", dict(truth__rates="0.2"), "--truth.rates=0.2: expected the first feature's rate"),
        ("ground_truth", dict(truth__roots=30), "more than --truth.features=32"),
        ("ground_truth", dict(truth__samples=100), "fewer than one batch"),
        ("ground_truth", dict(train__form="transcoder"), "--train.form=transcoder"),
        ("ground_truth", dict(train__k=99), "--train.k=99 is more than the 32 features"),
        ("ground_truth", dict(truth__features=0), "nothing to make"),
        ("known_circuits", dict(known__circuits="sorting"), "expected one of induction, logic"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, stage, changes, message):
    assert run(stage, tmp_path, **changes) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


@pytest.mark.slow
def test_the_small_world_is_found(tmp_path):
    """256 features in 128 dimensions from a quarter of a million vectors in one pass."""
    flags = [f"--flagfile={runs.ROOT}/configs/ground_truth.flags", "--train.kinds=topk"]
    runs.finish(runs.start("ground_truth", [*flags, "--unit=ground_truth/topk", f"--workdir={tmp_path}"]))
    (judged,) = load_results(tmp_path / "ground_truth/topk").dictionaries
    assert judged.scores.recovered.mean >= 0.9


# Statement 3 of WORKSPACE.md, what must hold.
def test_what_is_declared_is_read(whole):
    """Otherwise a changed setting would make again what is the same."""
    assert settings_read.never_read("ground_truth") <= set()

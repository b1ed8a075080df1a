"""``experiments.explain`` as a program, against a server: its flags, what it resumes, its limit, its exit status."""

import json
import re
import time

import protocol
import pytest
import runs

from saejax import load_results
from saejax.interpret.results import ExplainResults
from saejax.runner import command

pytestmark = pytest.mark.usefixtures("single_device")
STAGES = ["baseline", "capture", "train", "interpret"]


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    """A workdir with an interpreted dictionary; and the flags of its run."""
    folder = tmp_path_factory.mktemp("explained")
    flags = runs.small_flags(
        *inputs, folder, train__kinds="topk", train__epochs=2, interpret__dictionaries="topk",
        analysis__batch_tokens=64, interpret__attention_tokens=0, task__train_prompts=2, task__test_prompts=2,
        ablate__dictionary="standard", explain__dictionaries="topk", explain__model="judge", explain__sample=6,
    )  # fmt: skip
    assert command.run(STAGES, "", ["test", *flags]) == 0
    return folder, flags


def answer(prompt):
    """Labels with the prompt's length, and yes to everything."""
    if "[EXPLANATION]" in prompt:
        return f"[EXPLANATION]: word {len(prompt)}"
    return json.dumps([1] * len(protocol.texts_of(prompt)))


def test_it_stops_at_its_limit_goes_on_and_asks_nothing_twice(workdir, capsys):
    folder, flags = workdir
    unit = folder / "explain" / "topk"
    with protocol.Server(answer) as server:
        flags = [*flags, f"--explain.url={server.url}"]
        assert command.run(["explain"], "", ["test", *flags, "--explain.most_tokens=100"]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "--explain.most_tokens=100" in error and "raise the limit" in error
        before = list(server.asked)
        assert 0 < len(before) == len((unit / "answers.jsonl").read_text().splitlines())
        assert not (unit / "done.json").exists() and not (unit / "labels.json").exists()
        output = runs.finish(runs.start("explain", flags))  # the binary itself
        assert re.search(r"of 6 features keep a label, detection 0.50 \(control 0.50\)", output), output
        assert len(server.asked) == len(set(server.asked)) and server.asked[: len(before)] == before
        count = len(server.tries)
        assert command.run(["explain"], "", ["test", *flags]) == 0
        assert "explain/topk: done before, unchanged" in capsys.readouterr().out and len(server.tries) == count
    results = load_results(unit)
    assert isinstance(results, ExplainResults) and results.model == "judge"
    (member,) = results.members
    assert member.judged == 6 and member.accuracy.mean == member.control_accuracy == 0.5
    assert len((unit / "answers.jsonl").read_text().splitlines()) == len(server.asked) == count
    assert server.tries[0][1]["model"] == "judge"


def test_an_endpoint_that_is_down_ends_it_with_one_line(workdir, monkeypatch, capsys):
    folder, flags = workdir
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with protocol.Server(answer) as server:
        pass  # its port is free again
    assert command.run(["explain"], "", ["test", *flags, f"--explain.url={server.url}"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "gave no answer after 5 retries" in said and server.url in said and "run the same command again" in said
    (unit,) = [path for path in (folder / "explain").glob("topk-*") if not (path / "done.json").exists()]
    assert [path.name for path in unit.iterdir() if path.stat().st_size] == ["started.json"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--explain.sample=few", "sample"),
        ("--explain.url=localhost", "is not a URL"),
        ("--explain.features=128", "--explain.features names 128"),
        ("--explain.modell=x", "modell"),
    ],
)
def test_flags_that_are_refused(workdir, capsys, flag, said):
    _, flags = workdir
    url = "--explain.url=http://127.0.0.1:9/v1"
    assert command.run(["explain"], "", ["test", *flags, url, flag]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1

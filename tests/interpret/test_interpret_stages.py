"""The stages ``interpret``, ``atlas`` and ``explain`` as programs, on a tiny model and against a server."""

import json
import re
import time

import numpy as np
import protocol
import pytest
import runs
import settings_read

from saejax import load_results
from saejax.activations.store import Store
from saejax.dictionaries import load_dictionary
from saejax.interpret.results import ExplainResults
from saejax.runner import command
from saejax.runner.labels import labels_of

pytestmark = pytest.mark.usefixtures("single_device")
STAGES = ["baseline", "capture", "train", "interpret", "atlas"]
EXPLAIN = ["--explain.dictionaries=topk", "--explain.model=judge", "--explain.sample=4"]
OTHER_SAMPLE = [*EXPLAIN, "--explain.sample=3"]  # another unit: of one that is done the address is not read


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    """A workdir with a stack of two dictionaries, interpreted; and the flags of its run."""
    folder = tmp_path_factory.mktemp("interpreted")
    flags = runs.small_flags(
        *inputs, folder, train__kinds="topk", train__k="4,8", train__epochs=2, interpret__dictionaries="topk",
        analysis__batch_tokens=64, interpret__categories=True, task__train_prompts=2, task__test_prompts=2,
        ablate__dictionary="standard",
    )  # fmt: skip
    assert command.run(STAGES, "", ["test", *flags]) == 0
    return folder, flags


def records(folder):
    return [one for file in sorted((folder / "features").glob("*.json")) for one in json.loads(file.read_text())]


def test_every_feature_of_every_member_is_described(workdir):
    folder, _ = workdir
    results = load_results(folder / "interpret" / "topk")
    store = Store.open(folder / "capture")
    assert [member.name for member in results.members] == ["k4", "k8"]
    for member in results.members:
        dictionary = load_dictionary(folder / "train" / "topk" / member.name)
        f_BxF = np.asarray(dictionary.encode(store.read(member.site, store.rows("train", member.site))))
        made = records(folder / "interpret" / "topk" / member.name)
        assert [one["fires"] for one in made] == (f_BxF > 0).sum(0).tolist()
        assert member.features == len(made) == 128 and member.search_tokens == len(f_BxF)
        assert all(len(one["up"]) == len(one["down"]) == 10 for one in made)
        counts = member.categories
        assert counts.features == sum("categories" in one for one in made) and counts.shuffled <= counts.live
        assert counts.prompts == len((folder / "baseline" / "prompts.jsonl").read_text().splitlines())
        labels = {one["feature"]: one["label"] for one in made if "label" in one}
        own = labels_of(folder, f"topk/{member.name}")
        assert {feature: label.label for feature, label in own.items()} == labels
        assert member.labels.labelled == len(labels)
        page = folder / "atlas" / "topk" / member.name
        files = [path.name for path in (page / "data").iterdir()]
        assert (page / "index.html").exists() and sum(not name.startswith("map") for name in files) == 1 + 128 // 32
        assert not (folder / "interpret" / "topk" / member.name / "firings").exists()


def test_what_was_found_goes_to_neuronpedia(workdir, capsys):
    """The rows themselves are tested in tests/export."""
    folder, flags = workdir
    flags = [*flags, "--export.format=neuronpedia", "--export.dictionaries=topk"]
    assert command.run(["export"], "", ["test", *flags]) == 0
    exported = load_results(folder / "export" / "neuronpedia-topk")
    assert [member.folder.split("/")[-1] for member in exported.members] == ["0-res-topk-k4", "0-res-topk-k8"]
    assert all(any((folder / "export" / "neuronpedia-topk" / member.folder).iterdir()) for member in exported.members)
    flags = [*flags, "--interpret.dictionaries="]
    assert command.run(["export"], "", ["test", *flags]) == 2
    assert (
        "reads interpret/topk, which this run does not make: add --interpret.dictionaries=topk"
        in capsys.readouterr().err
    )


def test_labels_of_ones_own_win_and_only_the_pages_are_written_anew(workdir, tmp_path, capsys):
    folder, flags = workdir
    path = tmp_path / "labels.csv"
    path.write_text("feature,label,note,reviewer,dictionary\n5,mine,,Ada,topk/k8\n6,other,,Ada,tpok/k8\n")
    flags = [*flags, f"--atlas.labels={path}"]
    assert command.run(STAGES, "", ["test", *flags]) == 0
    said = capsys.readouterr().out
    (warning,) = (line for line in said.splitlines() if "warning: --atlas.labels" in line)
    assert "labels.csv, line 3 (tpok/k8)" in warning and warning.endswith("expected topk/k4, topk/k8")
    assert "interpret/topk: done before, unchanged" in said and "atlas/topk: started" in said
    assert labels_of(folder, "topk/k8")[5].by == "Ada"
    assert [one.by_hand for one in load_results(folder / "atlas" / "topk").members] == [0, 1]
    path.write_text("feature,label,note,reviewer,dictionary\n128,mine,,Ada,topk/k8\n")
    assert command.run(STAGES, "", ["test", *flags]) == 2
    error = capsys.readouterr().err
    assert "there is no feature '128' in topk/k8" in error and len(error.splitlines()) == 1


def test_a_model_that_the_text_was_not_captured_from_is_refused(workdir, tmp_path, capsys):
    _, flags = workdir
    deeper = runs.save_model(tmp_path / "other", num_hidden_layers=3)
    assert command.run(["interpret"], "", ["test", *flags, f"--model.path={deeper}"]) == 2
    assert "capture" in capsys.readouterr().err


def answer(prompt):
    """Labels with the prompt's length, and yes to everything."""
    if "[EXPLANATION]" in prompt:
        return f"[EXPLANATION]: word {len(prompt)}"
    return json.dumps([1] * len(protocol.texts_of(prompt)))


def test_it_stops_at_its_limit_goes_on_and_asks_nothing_twice(workdir, capsys):
    folder, flags = workdir
    unit = folder / "explain" / "topk"

    def answers():
        return [line for file in unit.glob("*/answers.jsonl") for line in file.read_text().splitlines()]

    with protocol.Server(answer) as server:
        flags = [*flags, *EXPLAIN, f"--explain.url={server.url}"]
        assert command.run(["explain"], "", ["test", *flags, "--explain.most_tokens=100"]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "--explain.most_tokens=100" in error and "raise the limit" in error
        before = list(server.asked)
        assert 0 < len(before) == len(answers())
        assert not (unit / "done.json").exists() and not list(unit.glob("*/labels.json"))
        assert command.run(["explain"], "", ["test", *flags]) == 0
        output = capsys.readouterr().out
        assert re.search(r"of 4 features keep a label, detection 0.50 \(control 0.50\)", output), output
        assert len(server.asked) == len(set(server.asked)) and server.asked[: len(before)] == before
        count = len(server.tries)
        assert command.run(["explain"], "", ["test", *flags]) == 0
        assert "explain/topk: done before, unchanged" in capsys.readouterr().out and len(server.tries) == count
    results = load_results(unit)
    assert isinstance(results, ExplainResults) and results.model == "judge"
    for member in results.members:
        assert member.judged == 4 and member.scores["detection"].value.mean == member.scores["detection"].control == 0.5
    assert len(answers()) == len(server.asked) == count
    assert server.tries[0][1]["model"] == "judge"


def test_an_endpoint_that_is_down_ends_it_with_one_line(workdir, monkeypatch, capsys):
    folder, flags = workdir
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with protocol.Server(answer) as server:
        pass  # its port is free again
    assert command.run(["explain"], "", ["test", *flags, *OTHER_SAMPLE, f"--explain.url={server.url}"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "gave no answer after 5 retries" in said and server.url in said and "run the same command again" in said
    (unit,) = [path for path in (folder / "explain").glob("topk-*") if not (path / "done.json").exists()]
    assert [path.name for path in unit.rglob("*") if path.is_file() and path.stat().st_size] == ["started.json"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--explain.sample=few", "sample"),
        ("--explain.url=localhost", "is not a URL"),
        ("--explain.features=128", "--explain.features names 128"),
        ("--explain.modell=x", "modell"),
        ("--explain.model=", "--explain.model is missing"),
        ("--explain.url=", "--explain.url is missing"),
    ],
)
def test_flags_that_are_refused(workdir, capsys, flag, said):
    _, flags = workdir
    url = "--explain.url=http://127.0.0.1:9/v1"
    assert command.run(["explain"], "", ["test", *flags, *OTHER_SAMPLE, url, flag]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


# Statement 3 of WORKSPACE.md, what must hold.
def test_what_is_declared_is_read(workdir):
    """Otherwise a changed setting would make again what is the same."""
    # It decides whether units of prompts are read.
    assert settings_read.never_read("interpret", "atlas") <= {"interpret.categories"}

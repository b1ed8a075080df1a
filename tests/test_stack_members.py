"""Each member of a stack is a unit of its own: what is trained, what is reused, and what a kill leaves."""

import json
import logging
import re
import shutil
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import runs

from saejax import load_dictionary, load_results
from saejax.activations.store import Store
from saejax.config import Configs
from saejax.errors import UserError
from saejax.files import write_json
from saejax.links import member_folder
from saejax.runner import command, command_line, pipeline
from saejax.runner.changes import describe_changes
from saejax.runner.labels import feature_names
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import Workspace
from saejax.stages.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("single_device")
BASE = dict(
    train__kinds="topk", task__behaviours="", train__max_steps=12, train__checkpoint_every=5,
    interpret__dictionaries="topk",
)  # fmt: skip
STAGES = ["capture", "train", "evaluate", "interpret"]


def flags(inputs, folder, **changes) -> list[str]:
    return runs.small_flags(*inputs, folder, **BASE | changes)


def go(inputs, folder, stages=STAGES, **changes) -> None:
    assert command.run(stages, "", ["program", *flags(inputs, folder, **changes)]) == 0


def read(inputs, folder, **changes) -> Configs:
    return command_line.read_configs(command_line.stage_flags(), ["program", *flags(inputs, folder, **changes)])


def plan(inputs, folder, **changes) -> Workplan:
    return Workplan(read(inputs, folder, **changes))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and bytes of each file."""
    files = sorted(path for path in folder.resolve().rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def swept(inputs, tmp_path_factory):
    """A sweep of k through to its scores and descriptions."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    go(inputs, folder, train__k="4,8")
    return folder


def test_one_more_member_trains_scores_and_interprets_one_dictionary(inputs, swept, tmp_path, capsys):
    run = runs.copy_run(swept, tmp_path / "run")
    places = [run / stage / "topk" / member for stage in STAGES[1:] for member in ("k4", "k8")]
    before = [contents(place) for place in places]
    capsys.readouterr()
    go(inputs, run, train__k="4,8,16")
    output = capsys.readouterr().out
    assert output.count("2 of 3 members done before") == 3, output
    assert "training topk: 32 -> 128" in output, "the new member alone"
    assert [contents(place) for place in places] == before
    for stage in STAGES[1:]:
        assert [member.name for member in load_results(run / stage / "topk").members] == ["k4", "k8", "k16"]
        assert [member.name for member in load_results(run / stage / "topk" / "k16").members] == [""]
    assert {record["member"] for record in read_metrics(run / "train" / "topk", ("loss",))} == {"k4", "k8", "k16"}
    go(inputs, run, train__k="4,8")
    assert capsys.readouterr().out.count("done before, unchanged") == 4


def test_results_of_a_dictionary_that_was_replaced_say_so(inputs, swept, tmp_path, caplog):
    """After a further member both are as they were; after another in its place the scores are of one that is gone."""
    run = runs.copy_run(swept, tmp_path / "run")
    with caplog.at_level(logging.WARNING, "absl"):
        for k, replaced in (("4,8,16", []), ("4,16", ["k8"])):
            go(inputs, run, ["train"], train__k=k)
            caplog.clear()
            load_results(run / "evaluate" / "topk")
            folders = [(run / "evaluate" / "topk" / member).resolve() for member in replaced]
            assert len(caplog.messages) == len(folders)
            for line, folder in zip(caplog.messages, folders, strict=True):
                assert line.startswith(f"{folder} is of the dictionary train/topk-") and "run evaluate again" in line


def test_a_member_alone_is_the_member_of_a_stack(inputs, swept, tmp_path, capsys):
    run = runs.copy_run(swept, tmp_path / "run")
    capsys.readouterr()
    go(inputs, run, train__k="8")
    assert capsys.readouterr().out.count("done before, unchanged") == 4
    assert (run / "train" / "topk").resolve().name == (swept / "train" / "topk" / "k8").resolve().name
    (member,) = load_results(run / "train" / "topk").members
    assert (member.name, member.settings["k"]) == ("", 8)
    assert load_dictionary(run / "train" / "topk").config.k == 8


def test_a_longer_stack_goes_on_from_a_shorter_one_with_the_same_bits(inputs, swept, tmp_path, capsys):
    run, fresh = runs.copy_run(swept, tmp_path / "run"), tmp_path / "fresh"
    runs.copy_units(swept, fresh, "capture")
    capsys.readouterr()
    for folder in (run, fresh):
        go(inputs, folder, ["train"], train__k="4,8", train__max_steps=20)
    output = capsys.readouterr().out
    assert output.count("going on from step 10 of a run of 12 steps") == output.count("resuming topk at step 10") == 1
    assert runs.dictionary_checksums(run) == runs.dictionary_checksums(fresh) != runs.dictionary_checksums(swept)
    losses = [[record["loss"] for record in read_metrics(each / "train" / "topk", ("loss",))] for each in (run, fresh)]
    assert losses[0] == losses[1]


def test_members_depend_on_what_their_training_reads(inputs, tmp_path):
    sites = "resid_post.0,resid_post.1"
    base = dict(train__k="4,8", train__seed="1,2", capture__sites=sites, train__sites=sites)
    stack = plan(inputs, tmp_path / "run", **base)
    names = list(stack.members("train/topk"))
    assert names[0] == "resid_post.0-seed1-k4" and len(names) == 8
    marks = {name: stack.fingerprint(f"train/topk/{name}") for name in names}
    assert len({*marks.values()}) == 8
    # Of several sites the name seeds initial values, so that a further or earlier one changes no others.
    turned = plan(inputs, tmp_path, **base | dict(train__sites="resid_post.1,resid_post.0"))
    assert {name: turned.fingerprint(f"train/topk/{name}") for name in names} == marks
    # Seed 2 of the stack takes tokens in the order of seed 1.
    for layer, seed, same in ((0, 1, False), (0, 2, False), (1, 1, False)):
        site = f"resid_post.{layer}"
        alone = plan(inputs, tmp_path, train__k="4", train__seed=seed, train__sites=site, capture__sites=site)
        assert (marks[f"{site}-seed{seed}-k4"] == alone.fingerprint("train/topk")) == same
    for setting in (dict(train__l1=3), dict(train__log_every=7), dict(mesh__member=2), dict(train__k="8,4")):
        changed = plan(inputs, tmp_path, **base | setting)
        assert {name: changed.fingerprint(f"train/topk/{name}") for name in names} == marks, setting
    # A feature's description depends on its own dictionary alone, whatever other layers the stack has.
    first = "interpret/topk/resid_post.0-seed1-k4"
    for name, setting in (
        (first, dict(train__seed="1,3")),
        (first.removesuffix("-k4"), dict(train__k="4")),
        (first, dict(train__sites="resid_post.1,resid_post.0")),
    ):
        assert stack.fingerprint(first) == plan(inputs, tmp_path, **base | setting).fingerprint(name)


def test_the_hash_of_a_stack_is_made_of_what_the_page_says(inputs, tmp_path):
    """The table of WORKSPACE.md."""
    text = (runs.ROOT / "WORKSPACE.md").read_text()
    table = text[text.index("For example, `--train.kinds=topk") :].split("\n\n")[1]
    stack = plan(inputs, tmp_path, train__k="16,32")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 4
    for unit, settings, read in rows:
        depends = stack.dependencies(unit.strip("`"))
        assert (settings == "none") == (not depends["settings"])
        assert {*depends["needs"]} <= {*re.findall("`([^`]+)`", read)} and "log_every" not in str(depends["settings"])
    assert depends["needs"] == {f"evaluate/topk/k{k}": stack.fingerprint(f"evaluate/topk/k{k}") for k in (16, 32)}
    assert stack.dependencies("train/topk/k16")["settings"]["train.k"] == [16]
    assert stack.dependencies("evaluate/topk/k16")["needs"]["train/topk"] == stack.fingerprint("train/topk/k16")
    assert stack.fingerprint("train/topk/k16") == plan(inputs, tmp_path, train__k=16).fingerprint("train/topk")
    seeds = plan(inputs, tmp_path, train__k=16, train__seed="1,2")
    assert [seeds.dependencies(f"train/topk/seed{n}")["sources"].get("order_seed") for n in (1, 2)] == [None, "1"]


def test_a_stack_in_place_of_one_dictionary_is_no_list_of_settings(inputs, tmp_path):
    alone, stack = (plan(inputs, tmp_path / "run", train__k=k) for k in ("4", "4,8"))
    for before, after, words in (
        (alone, stack, "alone before, now a stack of 2"),
        (stack, alone, "a stack before, now"),
    ):
        write_json(tmp_path / "started.json", dict(depends_on=before.dependencies("train/topk")))
        assert words in describe_changes(after, "train/topk", tmp_path)


def test_a_stage_reads_the_member_that_its_flag_names(inputs, tmp_path):
    ablated = dict(task__behaviours="agreement", ablate__dictionary="topk/k8")
    two = plan(inputs, tmp_path, train__k="4,8", **ablated)
    assert two.needs("ablate/topk-k8") == ["baseline", "train/topk/k8"]
    three = plan(inputs, tmp_path, train__k="4,8,16", **ablated)
    assert two.fingerprint("ablate/topk-k8") == three.fingerprint("ablate/topk-k8")
    with pytest.raises(UserError, match=r"--ablate.dictionary=topk/k8: there is no member k8.* of k4, k16"):
        plan(inputs, tmp_path, train__k="4,16", **ablated).needs("ablate/topk-k8")


def test_a_member_of_other_settings_is_refused_in_one_line(inputs, swept, tmp_path, capsys):
    run = runs.copy_run(swept, tmp_path / "run")
    tracked = dict(track__dictionaries="topk/k8", track__prompt="The cat runs")
    changed = flags(inputs, run, train__k="4,8", train__max_steps=13, **tracked)
    assert command.run(["track"], "", ["program", *changed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train/topk/k8, which was made with other settings (--train.max_steps was 12, is 13)" in line


# Statement 1 of WORKSPACE.md, what must hold.
@pytest.mark.parametrize("members_done", [0, 1])
def test_a_stack_that_was_stopped_goes_on_with_the_same_bits(inputs, swept, tmp_path, monkeypatch, members_done):
    """Stopped in the middle of its training, or between the summaries of two members."""
    run = tmp_path / "run"
    runs.copy_units(swept, run, "capture")
    if members_done:
        finish = Mock(side_effect=[DEFAULT, KeyboardInterrupt], wraps=Workspace.finish)
        monkeypatch.setattr(Workspace, "finish", lambda *arguments, **options: finish(*arguments, **options))
        assert command.run(["train"], "", ["program", *flags(inputs, run, train__k="4,8")]) == 130
        monkeypatch.undo()
    else:
        configs, questions = read(inputs, run, train__k="4,8"), iter(range(100))
        with pytest.raises(pipeline.Interrupted):
            pipeline.run_stages(["train"], configs, run, stopping=lambda: next(questions) > 7)
    stack = json.loads((run / "train" / "topk" / "stack.json").read_text())
    assert stack["together"] == ["k4", "k8"]
    done = [(run / "train" / folder / "done.json").exists() for folder in stack["members"].values()]
    assert done == [members_done == 1, False]
    go(inputs, run, ["train"], train__k="4,8")
    assert runs.dictionary_checksums(run) == runs.dictionary_checksums(swept)


def test_a_member_that_was_deleted_is_trained_again(inputs, swept, tmp_path):
    run = runs.copy_run(swept, tmp_path / "run")
    kept = contents(run / "train" / "topk" / "k4")
    shutil.rmtree((run / "train" / "topk" / "k8").resolve())
    go(inputs, run, ["train"], train__k="4,8")
    assert contents(run / "train" / "topk" / "k4") == kept
    assert runs.dictionary_checksums(run) == runs.dictionary_checksums(swept)


@pytest.mark.parametrize("source", ["store", pytest.param("model", marks=pytest.mark.slow)])
def test_a_member_leaves_out_the_sinks_of_its_own_site_alone(inputs, tmp_path, source):
    """Two sites with many sinks, which differ: each member trained alone has the bits of the one of the stack."""
    sites, flag = "resid_post.0,resid_post.1", dict(capture__sink_factor=1.1, capture__max_sink_share=0.9)
    flag |= dict(capture__sites=sites, train__sites=sites, train__source=source, train__auxk=0.1)
    flag |= dict(train__batch=64, train__buffer_rows=256, train__score_every=5, train__max_steps=12)
    stages, run = ["capture", "train"] if source == "store" else ["tokenize", "train"], tmp_path / "run"
    go(inputs, run, stages, **flag)
    trained = runs.dictionary_checksums(run)
    if source == "store":
        store = Store.open(run / "capture")
        sinks = [len(store.usable("train", site).excluded) for site in sites.split(",")]
        assert len(store.usable("train", *sites.split(",")).excluded) > max(sinks) > 20
    for member in sites.split(","):
        shutil.rmtree((run / "train" / "topk" / member).resolve())
        go(inputs, run, stages, **flag)
        assert runs.dictionary_checksums(run) == trained, member


def test_without_links_a_text_file_leads_to_a_member(inputs, swept, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("os.symlink", Mock(side_effect=OSError("no links here")))
    go(inputs, run, ["capture", "train", "interpret", "atlas"], train__k="4,8")
    assert feature_names(run, "topk/k8")
    unit = run / "train" / (run / "train" / "topk.current").read_text().strip()
    assert load_dictionary(member_folder(unit, "k8")).config.k == 8
    for folder in (unit, run / "train" / "topk"):
        assert [member.name for member in load_results(folder).members] == ["k4", "k8"]
    assert load_dictionary(run / "train" / "topk" / "k8").config.k == 8

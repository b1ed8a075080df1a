"""Every kind of bad input: one clear line, exit status 2, nothing half-written."""

import contextlib
import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import runs
from safetensors.numpy import load_file, save_file

from saejax.dictionaries.formats import tensors
from saejax.runner import command, command_line
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import Workspace
from saejax.tasks.answer_tokens import MERGED
from saejax.tasks.recipes import recipes

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def captured(inputs, tmp_path_factory):
    """A workdir with baseline and capture done."""
    workdir = tmp_path_factory.mktemp("captured") / "run"
    assert command.run(["baseline", "capture"], "", ["program", *runs.small_flags(*inputs, workdir)]) == 0
    return workdir


@pytest.fixture
def workdir(captured, tmp_path):
    """A copy of it."""
    return runs.copy_run(captured, tmp_path / "run")


@pytest.fixture
def refuse(inputs, tmp_path, capsys):
    """Runs stages that must be refused; gives the line that says why."""

    def run(stages, extra="", workdir=tmp_path / "run", model=inputs[0], corpus=inputs[1], **changes):
        capsys.readouterr()
        flags = [*runs.small_flags(model, corpus, workdir, **changes), *extra.split()]
        assert command.run(stages, "", ["program", *flags]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: "), error
        assert not (tmp_path / "run" / stages[-1] / "done.json").exists()
        return error[0]

    return run


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many KiB and gives its folder."""
    with contextlib.ExitStack() as mounted:

        def mount(size):
            folder = tmp_path / f"small-{size}"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("this user cannot mount a tmpfs")
            mounted.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
            return folder

        yield mount


TRANSCODER = dict(train__sites="mlp_in.0", train__form="transcoder")
EXPLAINED = dict(interpret__dictionaries="topk", explain__dictionaries="topk")
STACK = dict(train__k="4,8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=""), "--model.path is empty"),
        (dict(model="someone/nothing"), "someone/nothing"),
        (dict(train__sites="resid_pst.1"), "there is no site 'resid_pst.1'"),
        (dict(train__sites="mlp_out.0"), "--train.sites needs mlp_out.0, which --capture.sites="),
        (TRANSCODER | dict(capture__sites="mlp_in.0"), "--train.sites needs mlp_out.0, which --capture.sites="),
        (dict(train__sites="all", train__form="skip_transcoder"), "has no mlp_in sites"),
        (STACK, "--ablate.dictionary=topk: topk is a stack of 2.* of k4, k8"),
        (STACK | dict(ablate__dictionary="topk/k9"), "there is no member k9"),
        (dict(ablate__dictionary="gated"), "is no dictionary that is trained here"),
        (dict(ablate__baselines="foo"), r"unknown basis \(--ablate.baselines\), and no folder of a dictionary: 'foo'"),
        (dict(train__k=""), "--train.k is empty: name a value, or several"),
        (dict(train__kinds="topk,topk"), "--train.kinds=topk,topk: name each one once"),
        (dict(train__expansion="4,8", train__features=16), "error: --train.expansion=4,8: give one value, or a list"),
        (dict(train__b1=1), "--train.b1 is 1.0"),
        (dict(train__warmup=10**20), "--train.warmup is 100000000000000000000: expected at most 1000000000"),
        (dict(train__features=10**20), "--train.features is 100000000000000000000: expected at most"),
        (dict(train__init_from="/none"), "--train.init_from=/none does not exist"),
        (dict(interpret__dictionaries="topk", atlas__labels="/none"), "--atlas.labels=/none is no file"),
        (EXPLAINED, "--explain.model is missing"),
        (dict(mesh__processes=2, mesh__process_id=5), "--mesh.process_id=5 is none of 2 processes"),
        (dict(mesh__coordinator="foo"), "--mesh.coordinator=foo names no port: expected HOST:PORT"),
    ],
)
def test_settings_that_preflight_refuses(refuse, changes, message):
    assert re.search(message, refuse(["preflight"], **changes))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("baseline", dict(model="/no/where"), "there is no model folder"),
        ("baseline", dict(workdir="/dev/null/run"), "cannot be written to"),
        ("train", dict(workdir=""), "--workdir=DIR is missing"),
        ("train", dict(train__batch=0), "--train.batch is 0: expected at least 1"),
        ("train", dict(train__sites="resid_pst.1"), "there is no site 'resid_pst.1'"),
        ("train", {}, "run experiments.capture with the same flags first"),
        (
            "explain",
            dict(EXPLAINED, interpret__dictionaries="", explain__model="judge", explain__url="http://localhost/v1"),
            "explain/topk reads interpret/topk, which this run does not make: add --interpret.dictionaries=topk",
        ),
        ("patch", {}, "it patches activations.*--patch.dictionary is set"),
        ("train", dict(extra="--train.bach=3"), "Did you mean: train.batch"),
        ("train", dict(extra="batch=3"), "is not a flag"),
        ("train", dict(extra="--flagfile=nowhere.flags"), "error: the flag file nowhere.flags cannot be read"),
        ("capture", dict(capture__sites="resid_last.0", task__behaviours=""), "there is no site 'resid_last.0'"),
        # Before anything is captured and trained for them.
        ("capture,ablate", dict(ablate__positions="middle"), "there are no positions 'middle'"),
        ("capture,ablate", dict(ablate__repeats="topk"), "name each dictionary once"),
        ("capture,ablate", dict(ablate__joined="standard", ablate__error="drop"), "--ablate.joined goes with none of"),
        ("capture,transfer", dict(transfer__dictionaries="topk"), "topk is one dictionary: name two at least"),
        ("capture,transfer", dict(STACK, transfer__dictionaries="topk/k4"), "is one dictionary: name two at least"),
    ],
)
def test_settings_that_a_stage_refuses(refuse, tmp_path, stage, changes, message):
    assert re.search(message, refuse(stage.split(","), **changes))
    assert not list((tmp_path / "run").glob("capture*"))


def test_a_flag_file_is_named_by_its_flag(refuse, tmp_path):
    plain = tmp_path / "mine"
    plain.write_text("--train.k=8\n")
    for name in ("mine.flags", str(plain)):
        assert refuse(["train"], name).endswith(f" is not a flag: a file of flags is read with --flagfile={name}")
    assert refuse(["train"], "nowhere").endswith("is not a flag: flags are --group.field=value; --help lists them")


def test_a_process_that_cannot_find_the_others(tmp_path):
    flags = [f"--workdir={tmp_path / 'run'}", "--mesh.processes=2"]
    process = subprocess.run(
        [sys.executable, "-m", "experiments.preflight", *flags], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("error: process 0 of 2 finds no others by --mesh.coordinator= ")


def test_a_line_of_a_flag_file_is_named(refuse, tmp_path):
    file = tmp_path / "bad.flags"
    for line, message in (
        ("--train.kind=topk", "Unknown command line flag 'train.kind'"),
        ("train.kinds=topk", "'train.kinds=topk' is not a flag"),
        ("--train.k=x", "flag --train.k=x"),
        ("--train.k = 9", "Unknown command line flag 'train.k '"),  # which another file sets, too
        ('{"prompt": "' + "long " * 100 + '"}', "is not a flag"),
    ):
        file.write_text(f"# a comment\n\n{line}\n")
        error = refuse(["train"], f"--flagfile={file}")
        assert f"{file}, line 3: " in error and message in error
        assert len(error) < len(str(file)) + 250
    around = tmp_path / "around.flags"
    around.write_text(f"--flagfile={file}\n")
    not_utf8, marked = "is not UTF-8 text", "begins with a byte order mark"
    for written, message in (("utf-16", not_utf8), ("utf-16-le", not_utf8), ("utf-8-sig", marked)):
        file.write_bytes("--train.k=8".encode(written))
        for named in (f"--flagfile={file}", f"--flagfile {file}", f"--flagfile={around}"):
            assert f"{file} {message}" in refuse(["train"], named)
    # What stands on the command line is not blamed on a flag file that sets the same flag.
    assert refuse(["train"], "--train.k=8,x").startswith("error: flag --train.k=8,x: 'x' is not a whole number")


def test_a_start_that_was_refused_leaves_nothing_behind(inputs, tmp_path):
    for sites, status in (("resid_post.99", 2), ("resid_post.98", 2), ("resid_post.0", 0)):
        flags = runs.small_flags(*inputs, tmp_path / "run", capture__sites=sites, task__behaviours="")
        assert command.run(["capture"], "", ["program", *flags]) == status
    assert len(list((tmp_path / "run").glob("capture-*"))) == 1 and (tmp_path / "run" / "capture").is_symlink()


@pytest.mark.parametrize("content", ["{}", "[]", "1", "{"])
def test_json_that_is_something_else(refuse, workdir, tmp_path, content):
    (workdir / "capture" / "done.json").write_text(content)
    assert "done.json" in refuse(["train"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "dictionary.json").write_text(content)
    assert "dictionary.json" in refuse(["preflight"], ablate__dictionary=tmp_path / "folder")


def test_stores_that_are_damaged_or_of_another_model(refuse, workdir, tmp_path):
    line = refuse(["train"], model=runs.save_model(tmp_path / "wider", hidden_size=64))
    assert "was made with other settings (model is different)" in line
    shard = workdir / "capture" / "resid_post.0" / "shard-00000.npy"
    content = shard.read_bytes()
    for damaged in (content[:-100], content[:-100] + bytes(100)):
        shard.write_bytes(damaged)
        assert "shard-00000.npy" in refuse(["train"])


def test_nan_in_activations_is_located(refuse, inputs, tmp_path):
    shutil.copytree(inputs[0], tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    weights = load_file(file)
    weights[name] = weights[name].copy()
    weights[name][0, 0] = np.nan
    save_file(weights, file, metadata=dict(format="pt"))
    assert "nan" in refuse(["baseline", "capture"], model=tmp_path / "model").lower()


def test_a_disk_that_fills_during_capture_and_during_a_checkpoint(refuse, captured, small_disk, caplog):
    run = small_disk(150) / "run"
    assert "disk is full" in refuse(["baseline", "capture"], workdir=run)
    assert not (run / "capture" / "manifest.json").exists()
    size = sum(path.stat().st_size for path in captured.rglob("*") if path.is_file()) // 1024 + 250
    assert "disk is full" in refuse(["train"], workdir=runs.copy_run(captured, small_disk(size) / "run"))
    assert [record.levelname for record in caplog.records if record.name == "absl"] == []


def test_a_full_disk_is_an_error_also_where_files_are_written_through_memory(small_disk):
    """Of a file without its space on disk the write would end the process by SIGBUS, without a word."""
    file = small_disk(64) / "arrays.safetensors"
    with pytest.raises(OSError, match="No space left on device"):
        tensors.write(file, dict(a=np.zeros(2**16, np.float32)))


def status_of(error: Exception) -> int:
    """Return the exit status of a run in which an error is raised."""

    def work():
        raise error

    return status_of_work(work)


def status_of_work(work) -> int:
    """Return the exit status of a run that does this."""
    flag_values = command_line.stage_flags()
    flag_values(["program", "--workdir=x"])
    return command.run_and_report(work, flag_values)


@pytest.mark.parametrize(
    "error",
    [
        *[OSError(errno.EDQUOT, "", "x"), OSError(errno.EDQUOT, ""), ValueError("ABORTED: Disk quota exceeded")],
        shutil.Error([("a", "b", "[Errno 122] Disk quota exceeded")]),
    ],
)
def test_a_quota_that_ends(error, capsys):
    assert status_of(error) == 2
    assert capsys.readouterr().err == "error: x: the disk quota is used up: free space, then run again\n"


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.EIO])
def test_what_a_file_system_refuses(number, capsys):
    """Such as a folder in a file's place, of a unit that was made before."""
    assert status_of(OSError(number, os.strerror(number), "done.json")) == 2
    assert capsys.readouterr().err == f"error: done.json: {os.strerror(number).lower()}\n"


TERMINAL_PROGRAM = """
import fcntl, signal, sys, termios, time
from saejax.runner import command
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # this session's terminal
for handler in (signal.SIG_IGN, signal.SIG_DFL):  # as under nohup, and without it
    signal.signal(signal.SIGHUP, handler)
    stopping = command.install_signal_handlers()
    assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == (handler == signal.SIG_IGN)
print("ready", flush=True)
while not stopping():
    time.sleep(0.01)
print("said to nobody", flush=True)
open(sys.argv[1], "w").write("stopped")
"""


def test_a_terminal_that_closes(tmp_path):
    """A run hears of it, unless that is ignored, and what it prints from then on goes nowhere."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL_PROGRAM, str(tmp_path / "end")],
        **dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True),
    )
    os.close(theirs)
    output = b""
    while b"ready" not in output:
        output += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(60) == 0 and (tmp_path / "end").read_text() == "stopped"


def test_output_that_nobody_reads(monkeypatch, capsys):
    """Text that is only shown may end early; a run says that it has stopped."""
    for shown in (True, False):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as output, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            if shown:
                command.show_text("text")
            else:
                assert status_of_work(lambda: command.make_logger()("text")) == 2
    assert re.fullmatch(r"error: nobody reads the output any more [^\n]+\n", capsys.readouterr().err)


def test_output_on_a_full_disk(monkeypatch, capsys):
    with open("/dev/full", "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert status_of_work(lambda: command.make_logger()("text")) == 2
    said = "error: standard output: the disk is full: free space, then run again\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore lines"),
        RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),
        MemoryError("Unable to allocate 9 TiB"),
        MemoryError(),
    ],
)
def test_memory_that_is_used_up(error, capsys):
    assert status_of(error) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"error: memory is used up \([^\n]+\): experiments.preflight with the same flags .*\n", line)


def test_corpora_and_prompts_that_do_not_fit(refuse, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refuse(["preflight"], corpus=tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    assert "2" in refuse(["preflight"], corpus=tmp_path / "bad.jsonl")
    assert "context" in refuse(["baseline"], model=runs.save_model(tmp_path / "short", max_position_embeddings=8))


def test_two_runs_that_make_one_unit(refuse, inputs, tmp_path):
    flags = ["program", *runs.small_flags(*inputs, tmp_path / "run")]
    plan = Workplan(command_line.read_configs(command_line.stage_flags(), flags))
    with Workspace(tmp_path / "run").claim("baseline", plan.fingerprint("baseline")):
        assert f"baseline is being made by process {os.getpid()}" in refuse(["baseline"])


def test_settings_that_do_not_fit_the_store(refuse, workdir):
    streamed = dict(TRANSCODER, train__source="model", train__alignment=0.3)
    for message, changes in {
        "fewer than one batch": dict(train__batch=80000),
        "is more than the 128 features": dict(train__k=129),
        "--train.alignment=0.3 aligns encoder and decoder": streamed,
        "not divisible by the 2 devices": dict(train__batch=63),
        "make the product 2": dict(mesh__model=3),
        "has resid_post.0: capture it, too (--capture.sites=resid_post.0,mlp_out.0)": dict(train__sites="mlp_out.0"),
        "--train.jumprelu.target_l0=8 has no effect with --train.jumprelu.l0_penalty=step": {
            "train__kinds": "jumprelu",
            "train.jumprelu.target_l0": 8,
        },
        "--train.freeze=encoder: a matching_pursuit dictionary has none": dict(
            train__kinds="matching_pursuit", train__freeze="encoder"
        ),
        "a matching_pursuit dictionary has no encoder; leave it out": dict(
            train__kinds="matching_pursuit", train__alignment=0.3
        ),
        "replaces what --train.freeze=decoder keeps": dict(train__resample_every=5, train__freeze="decoder"),
    }.items():
        assert message in refuse(["train"], **changes)
    assert "unknown dictionary" in refuse(["ablate"], ablate__dictionary="standart")


def test_folders_of_dictionaries_that_do_not_fit(refuse, inputs, workdir, tmp_path):
    empty, trained = tmp_path / "empty", tmp_path / "trained"
    empty.mkdir()
    assert "holds no dictionary" in refuse(["train"], train__init_from=empty)
    flags = runs.small_flags(*inputs, workdir, train__kinds="topk", train__epochs=1)
    assert command.run(["train"], "", ["program", *flags]) == 0
    shutil.move((workdir / "train" / "topk").resolve(), trained)
    shutil.rmtree(workdir / "train")
    line = refuse(["train"], train__kinds="standard", train__expansion=2, train__init_from=trained)
    assert "does not fit: kind is topk, expected standard; features is 128, expected at most 64" in line
    ablated = dict(ablate__dictionary=trained)
    assert "empty holds no dictionary" in refuse(["ablate"], **ablated, ablate__baselines=empty)
    without_directions = shutil.copytree(trained / "dictionary", tmp_path / "none") / "dictionary.json"
    description = json.loads(without_directions.read_text())
    description["config"]["n_features"] = 0
    without_directions.write_text(json.dumps(description))
    assert "n_features" in refuse(["ablate"], **ablated, ablate__baselines=tmp_path / "none")


def test_words_that_make_too_few_prompts(refuse, monkeypatch):
    """A template without items, and a tokenizer that merges every answer."""
    empty = recipes()["capital"]._replace(templates=("Paris lies in", "Rome lies in", "The city lies in"))
    with monkeypatch.context() as patch:
        patch.setattr("saejax.tasks.draw.recipes", lambda: dict(capital=empty))
        line = refuse(["baseline"], task__behaviours="capital")
    assert "the word lists of capital give 2 train prompts of 4, and no more of the template 'Paris lies in'" in line
    monkeypatch.setattr("saejax.tasks.draw.fault", lambda tokenizer, prompt: MERGED)
    line = refuse(["baseline"])
    assert "no behaviour is left to test: agreement: 0 of 4 train prompts could be made" in line and MERGED in line

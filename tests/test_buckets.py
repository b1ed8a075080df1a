"""Workdirs in buckets: whole from anywhere, one run at a time, and never less than what was copied before.

The store is obstore's own in memory; ``tests/cluster/test_s3.py`` has a server.
"""

import contextlib
import json
import os
import time

import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from saejax import command
from saejax.buckets import bucket, lease, mirror
from saejax.buckets.bucket import Bucket
from saejax.errors import UserError
from saejax.workspace import Workspace

URL = "s3://runs/demo"
XML = '<?xml version="1.0"?>\n<Error><Code>QuotaExceeded</Code><Message>No room</Message><HostId>much</HostId></Error>'


class Store:
    """A store that fails when it is told to: at once, or after so many calls that change something."""

    def __init__(self):
        self._store, self.error, self.left = MemoryStore(), None, float("inf")

    def __getattr__(self, name):
        def call(*args, **more):
            if name in ("put", "delete", "copy"):
                self.left -= 1
            if self.error and self.left < 0:
                raise self.error
            return getattr(self._store, name)(*args, **more)

        return call


@pytest.fixture
def store(monkeypatch):
    made = Store()
    monkeypatch.setattr(bucket, "_opened", lambda url: made)
    return made


def space(folder, **more) -> Workspace:
    return Workspace(URL, str(folder), **more)


def silent(line: str) -> None:
    pass


@contextlib.contextmanager
def killed(store):
    """The block's copies to the bucket count; what comes after it, its end included, does not."""
    with pytest.raises(UserError), contextlib.ExitStack() as held:
        yield held
        store.error, store.left = GenericError("no network"), 0
    store.error, store.left = None, float("inf")


def listed(store) -> dict:
    return json.loads(bytes(store.get(".files.json").bytes()))["files"]


def finish(workspace: Workspace, mark="m", content="abc", stage="train", name="topk") -> None:
    folder, _ = workspace.begin(stage, name, mark)
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "result.txt").write_text(content)
    workspace.finish(stage, name, mark, dict(results=dict(a=1)))


def test_a_unit_is_found_on_another_machine(store, tmp_path):
    one = space(tmp_path / "one")
    with one.lock(silent):
        finish(one)
        finish(one, stage="capture", name="")
        (one.root / "rules.jsonl").write_text("{}\n")
        (one.root / ".processes").mkdir()
        (one.root / ".processes" / "word").touch()
    assert set(listed(store)) == {
        "rules.jsonl",
        *(f"{u}/{f}" for u in ("train/topk", "capture") for f in ("started.json", "summary.json", "deep/result.txt")),
    }
    two = space(tmp_path / "two")
    with two.lock(silent):
        assert two.finished("train", "topk", "m") and two.finished("capture", "", "m")
        assert not two.finished("train", "topk", "other")
        assert (two.root / "rules.jsonl").read_text() == "{}\n"
        assert not (two.root / "capture/deep").exists(), "a store comes when it is read"
        assert (two.bring("capture", "") / "deep/result.txt").read_text() == "abc"
    with space(tmp_path / "one").lock(silent):
        assert (one.root / "train/topk/deep/result.txt").stat().st_mtime  # went on as it was


def test_a_killed_run_goes_on_elsewhere(store, tmp_path, monkeypatch):
    one = space(tmp_path / "one")
    with killed(store) as held:
        held.enter_context(one.lock(silent))
        folder, _ = one.begin("train", "topk", "m")
        (folder / "checkpoints/5").mkdir(parents=True)
        (folder / "checkpoints/5/state").write_text("five")
        (folder / "checkpoints/7.orbax-checkpoint-tmp-1").mkdir()
        (folder / "checkpoints/7.orbax-checkpoint-tmp-1/state").write_text("half")
        (folder / ".x.writing-3").write_text("half")
        one._mirror.copy("")
        (folder / "late.txt").write_text("not copied")
    with pytest.raises(UserError, match="last sign of life was 0 s ago.*--break_lock"), space(tmp_path / "two").lock():
        pass
    monkeypatch.setattr(lease, "_DEAD", 0.2)
    monkeypatch.setattr(lease, "_LOOK_EVERY", 0.05)
    two, lines = space(tmp_path / "two", break_lock=True), []
    with two.lock(lines.append):
        assert not (two.root / "train/topk/checkpoints").exists()
        folder, found = two.begin("train", "topk", "m")
        assert found == "resumed" and (folder / "checkpoints/5/state").read_text() == "five"
        assert {path.name for path in folder.rglob("*")} == {"started.json", "checkpoints", "5", "state"}
        finish(two)
    assert any("no sign of life of process" in line for line in lines)
    one = space(tmp_path / "one")  # the first machine is back: it is behind
    with one.lock(silent):
        assert one.finished("train", "topk", "m") and not (one.root / "train/topk/late.txt").exists()


def test_the_same_folder_goes_on_at_once_with_what_was_not_copied(store, tmp_path):
    with killed(store) as held:
        one = space(tmp_path / "one")
        held.enter_context(one.lock(silent))
        folder, _ = one.begin("train", "topk", "m")
        one._mirror.copy("")
        (folder / "late.txt").write_text("late")
    with one.lock(silent):
        assert one.begin("train", "topk", "m")[1] == "resumed"
        assert (folder / "late.txt").read_text() == "late"
    assert "train/topk/late.txt" in listed(store)


def test_a_run_that_fails_gives_its_bucket_back(store, tmp_path):
    one = space(tmp_path / "one")
    with pytest.raises(ZeroDivisionError), one.lock(silent):
        (one.root / "a.txt").write_text("a")
        raise ZeroDivisionError
    with space(tmp_path / "two").lock(silent):
        assert (tmp_path / "two" / "a.txt").read_text() == "a"


def test_a_run_that_is_alive_keeps_its_bucket(store, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_BEAT", 0.02)
    monkeypatch.setattr(lease, "_DEAD", 5.0)
    monkeypatch.setattr(lease, "_LOOK_EVERY", 0.2)
    with space(tmp_path / "one").lock(silent):
        for changes in ({}, dict(break_lock=True)):
            with pytest.raises(UserError, match="is in use"), space(tmp_path / "two", **changes).lock(silent):
                pass
    with space(tmp_path / "two").lock(silent):
        pass


def test_a_run_that_was_replaced_stops_and_copies_nothing_more(store, tmp_path, monkeypatch):
    one = space(tmp_path / "one")
    with pytest.raises(UserError, match="was taken over by process"), one.lock(silent):
        finish(one)
        monkeypatch.setattr(lease, "_DEAD", 0.1)
        monkeypatch.setattr(lease, "_LOOK_EVERY", 0.02)
        two = space(tmp_path / "two", break_lock=True)
        with two.lock(silent):
            one._mirror._lease.write()
            assert one.lost and not two.lost
            finish(one, mark="late", stage="evaluate")
    assert "evaluate/topk/started.json" not in listed(store)


def test_a_copy_that_is_cut_off_anywhere_leaves_what_was_there_whole(store, tmp_path):
    """A record is written after the file that it is about; wherever the network ends, both are there or none."""
    for calls in range(14):
        store.__init__()
        one = space(tmp_path / f"one-{calls}")
        with contextlib.suppress(UserError), one.lock(silent):
            finish(one, content="old")
            store.error, store.left = GenericError("no network"), calls
            folder, _ = one.begin("train", "topk", "new")
            for part in range(3):
                (folder / f"part-{part}.npy").write_text(f"{part}" * 10)
                (folder / f"part-{part}.json").write_text("{}")
            one.finish("train", "topk", "new", dict(results={}))
        store.error = None
        files = listed(store)
        for name, size in files.items():
            assert store.head(name)["size"] == size, (calls, name)
        for part in range(3):
            assert (f"train/topk/part-{part}.json" in files) == (f"train/topk/part-{part}.npy" in files)
        old = [name for name in files if name.endswith("result.txt")]
        assert len(old) == 1, (calls, files)
        if "train/topk/summary.json" in files and "superseded/train-topk-m/summary.json" in files:
            assert "train/topk/part-2.json" in files


def test_what_is_gone_here_goes_there_and_what_never_came_stays(store, tmp_path):
    one = space(tmp_path / "one")
    with one.lock(silent):
        finish(one, stage="capture", name="")
        finish(one)
    two = space(tmp_path / "two")
    with two.lock(silent):
        (two.root / "train/topk/deep/result.txt").unlink()
        two._mirror.copy("")
    assert "train/topk/deep/result.txt" not in listed(store) and "capture/deep/result.txt" in listed(store)
    with pytest.raises(FileNotFoundError):
        store.head("train/topk/deep/result.txt")
    with two.lock(silent):  # other settings: the store that was never brought is moved, too
        moved = two.begin("capture", "", "other")[1]
        assert moved.endswith("superseded/capture-m")
        assert two.put_back("capture", "", two.root / "superseded/capture-m")
        assert two.finished("capture", "", "m")
        two.begin("capture", "", "other")
    assert bytes(store.get("superseded/capture-m/deep/result.txt").bytes()) == b"abc"
    assert [name for name in listed(store) if name.startswith("capture/")] == ["capture/started.json"]


def test_a_file_written_while_copying_waits_for_the_next_time(store, tmp_path):
    one = space(tmp_path / "one")
    with one.lock(silent):
        folder, _ = one.begin("train", "topk", "m")
        (folder / "later").write_text("x")
        path = folder / "later"
        os.utime(path, ns=(time.time_ns() + 10**10,) * 2)
        one._mirror.copy()
        assert "train/topk/later" not in listed(store)
        one._mirror.copy("train/topk/")
        assert "train/topk/later" in listed(store)


def test_copies_are_made_while_the_run_goes_on(store, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_EVERY", 0.02)
    lines = []
    with space(tmp_path / "one").lock(lines.append):
        (tmp_path / "one" / "a.txt").write_text("a")
        while not _has(store, "a.txt"):
            time.sleep(0.02)
        store.error, store.left = GenericError("Server returned 507: quota is used up"), 0
        (tmp_path / "one" / "b.txt").write_text("b")
        while not lines:
            time.sleep(0.02)
        store.error = None
    assert "b.txt" in listed(store)
    assert len(lines) == 1 and "quota is used up" in lines[0] and lines[0].endswith("trying again")


def _has(store, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return name in listed(store)
    return False


def test_folders_of_other_things_are_refused(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds files of something else"), space(tmp_path / "mine").lock():
        pass
    with space(tmp_path / "one").lock(silent):
        pass
    other = Workspace("s3://runs/other", str(tmp_path / "one"))
    with pytest.raises(UserError, match="is the local folder of s3://runs/demo"), other.lock():
        pass
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd", "train/../../x"])
def test_names_that_lead_out_of_the_workdir_are_refused(store, tmp_path, name):
    store.put(".files.json", json.dumps(dict(id="x", serial="y", files={name: 1})).encode())
    with pytest.raises(UserError, match="outside of the workdir"), space(tmp_path / "one").lock(silent):
        pass


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError("403 AccessDenied"), "permission denied"),
        (FileNotFoundError("404 NoSuchBucket"), "no such bucket"),
        (GenericError("Server returned 507: quota is used up\n\nDebug source:\nmuch"), "quota is used up"),
        (GenericError(f"failed: {XML}"), "failed: QuotaExceeded: No room"),
    ],
)
def test_a_bucket_that_refuses_is_one_line(store, tmp_path, capsys, error, said):
    store.error, store.left = error, 0
    flags = [f"--workdir={URL}", f"--scratch={tmp_path / 'one'}"]
    assert command.run(["report"], "", ["program", *flags]) == 2
    line = capsys.readouterr().err.strip()
    assert (
        "\n" not in line and line.startswith(f"error: {URL}: writing .lock: ") and said in line and "much" not in line
    )


def test_damaged_words_of_a_bucket_are_named(store, tmp_path):
    store.put(".files.json", b"{")
    one, two = space(tmp_path / "one"), space(tmp_path / "two")
    with pytest.raises(UserError, match=r"s3://runs/demo/\.files\.json is not valid JSON"), one.lock(silent):
        pass
    store.put(".lock", b"hello")
    with pytest.raises(UserError, match="in use by something that is no run of saejax"), two.lock(silent):
        pass


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(UserError, match=r"takes the package obstore.*saejax\[buckets\]"):
        Bucket("gs://runs/demo")


def test_the_folder_of_a_bucket_has_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert mirror.scratch_folder("s3://runs/a/b/") == tmp_path / "saejax/workdirs/s3-runs-a-b"
    assert str(mirror.scratch_folder("s3://runs/a", "here")) == "here"

"""Captures that were killed, stopped or damaged go on to the same files."""

import dataclasses

import pytest
from capture_setup import RESUMED, files

from saejax.activations import capture
from saejax.activations.writer import StoreWriter
from saejax.errors import Interrupted


@pytest.fixture(scope="module")
def uninterrupted(setup):
    store, _ = setup.capture("uninterrupted", **RESUMED)
    assert store.manifest.shards > 5
    return files(store.folder)


def test_a_capture_killed_at_any_shard_goes_on_to_the_same_files(setup, uninterrupted, monkeypatch):
    """Killed in the middle of every shard in turn: some of the shard's files are there, not its record."""
    finished, write_site = [], StoreWriter.write_site

    class Killed(BaseException):
        pass

    def killed_in_the_middle(self, site, shard, rows):
        if site == "mlp_in.2" or (finished and finished[-1] == shard):
            return write_site(self, site, shard, rows)
        finished.append(shard)
        (self.folder / "resid_post.1").mkdir(exist_ok=True)
        (self.folder / "resid_post.1" / f"shard-{shard:05d}.npy").write_bytes(b"half a file")
        (self.folder / "resid_post.1" / f".shard-{shard:05d}.npy.writing-1").write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr(StoreWriter, "write_site", killed_in_the_middle)
    run = setup.make_run("killed", **RESUMED)
    kills = 0
    while not (run.folder / "manifest.json").exists():
        said = []
        try:
            capture.run_capture(dataclasses.replace(run, say=said.append))
        except Killed:
            kills += 1
            assert f"; {max(kills - 2, 0)} of " in said[0]  # all before the shard that the last kill hit
    assert finished == list(range(kills)) and kills > 5
    assert files(run.folder) == uninterrupted


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_stopped_capture_keeps_its_shards_and_goes_on(setup, on_one_device, backend):
    asked = 0

    def stopping():
        nonlocal asked
        asked += 1
        return asked % 5 == 0

    run = setup.make_run(f"stopped_{backend}", stopping=stopping, backend=backend, **RESUMED)
    stops = 0
    while not (run.folder / "manifest.json").exists():
        try:
            capture.run_capture(run)
        except Interrupted as stop:
            stops += 1
            assert f"{len(list(run.folder.glob('mlp_in.2/record-*')))} of " in str(stop)
    whole, _ = setup.capture(f"whole_{backend}", backend=backend, **RESUMED)
    assert stops > 2 and files(run.folder) == files(whole.folder)


def test_a_finished_shard_that_was_damaged_is_made_again(setup, uninterrupted):
    store, _ = setup.capture("damaged", **RESUMED)
    (store.folder / "manifest.json").unlink()
    shard = store.folder / "mlp_in.2" / "shard-00003.npy"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    setup.capture("damaged", **RESUMED)
    assert files(store.folder) == uninterrupted


@pytest.mark.parametrize("other", [dict(corpus=dict(max_tokens=150)), dict(backend="jax")], ids=["corpus", "backend"])
def test_shards_of_other_work_are_not_taken_over(setup, on_one_device, other):
    name, lines = f"before_{next(iter(other))}", []
    setup.capture(name, **RESUMED)
    setup.capture(name, say=lines.append, **RESUMED | other)
    assert "; 0 of " in lines[0]

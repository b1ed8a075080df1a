"""Captures that were killed, stopped or damaged go on to the same files."""

import dataclasses

import pytest
from capture_setup import RESUMED, files

from saejax.activations import capture
from saejax.activations.writer import StoreWriter
from saejax.errors import Interrupted
from saejax.settings import CorpusConfig


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


def test_a_stopped_capture_keeps_its_shards_and_goes_on(setup, uninterrupted):
    asked = 0

    def stopping():
        nonlocal asked
        asked += 1
        return asked % 5 == 0

    run = setup.make_run("stopped", stopping=stopping, **RESUMED)
    stops = 0
    while True:
        try:
            capture.run_capture(run)
            break
        except Interrupted as stop:
            stops += 1
            assert f"{len(list(run.folder.glob('mlp_in.2/record-*')))} of " in str(stop)
            assert not (run.folder / "manifest.json").exists()
    assert stops > 2
    assert files(run.folder) == uninterrupted


def test_a_finished_shard_that_was_damaged_is_made_again(setup, uninterrupted):
    store, _ = setup.capture("damaged", **RESUMED)
    (store.folder / "manifest.json").unlink()
    shard = store.folder / "mlp_in.2" / "shard-00003.npy"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    setup.capture("damaged", **RESUMED)
    assert files(store.folder) == uninterrupted


def test_shards_of_another_corpus_are_not_taken_over(setup):
    run = setup.make_run("other_text", **RESUMED)
    capture.run_capture(run)
    said = []
    corpus = dataclasses.replace(run.configs[CorpusConfig], max_tokens=150)
    capture.run_capture(dataclasses.replace(run, configs=run.configs | corpus, say=said.append))
    assert "; 0 of " in said[0]

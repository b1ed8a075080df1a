"""The stage ``cluster`` as a program: a stack of seeds, with a store and without one."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import settings_read
import trained_stack

from saejax import load_results
from saejax.activations.documents import Documents
from saejax.activations.store import Store
from saejax.parallel.settings import MeshConfig
from saejax.runner import command
from saejax.stages.cluster import run as cluster_run
from saejax.stages.cluster.report import sections
from saejax.stages.cluster.run import GroupedFeatures, open_texts
from saejax.stages.cluster.settings import ClusterConfig
from saejax.stages.transfer.inputs import load_compared

pytestmark = pytest.mark.usefixtures("single_device")


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    changes = dict(cluster__dictionaries="topk/resid_post.0-k4,topk/resid_post.0-k8")
    folder, flags = trained_stack.copy(inputs, tmp_path_factory, **changes)
    assert command.run(["cluster"], "", ["test", *flags]) == 0
    return folder, flags


def test_members_are_grouped(workdir):
    folder, _ = workdir
    results = load_results(folder / "cluster")
    first, second = results.dictionaries
    assert (first.name, second.name) == ("topk/resid_post.0-k4", "topk/resid_post.0-k8") and first.tokens > 300
    table = GroupedFeatures.load(folder / "cluster" / "000-topk-resid_post.0-k4-groups.parquet")
    assert 0 < len(table.feature) == first.features <= 128 and (table.group >= 0).sum() == first.grouped
    sets = [set(table.feature[table.group == group].tolist()) for group in np.unique(table.group[table.group >= 0])]
    assert len(sets) == first.count and all(set(group.features) in sets for group in first.largest)
    assert 0.5 <= first.bar <= 1
    assert all(group.stable == (group.overlap > first.bar) for group in first.largest)


def test_the_report_has_them_and_nothing_is_done_twice(workdir, capsys):
    folder, flags = workdir
    found = SimpleNamespace(select=lambda kind: {"": load_results(folder / "cluster")})
    (section,) = sections(found, None)
    assert "topk/resid_post.0-k8" in "\n".join(block.markdown() for block in section.blocks)
    assert command.run(["cluster"], "", ["test", *flags]) == 0
    assert "cluster: done before, unchanged" in capsys.readouterr().out


def test_tokens_of_a_store_are_in_the_order_of_the_text(workdir, monkeypatch):
    """Shuffled data shift runs of firings within texts; rows of a store are in random order, and have no runs.

    What is resampled is the text that a piece is of: pieces of one text depend on each other.
    """
    column = Documents.column

    def in_pairs(self, name):
        """Every two documents as pieces of one text."""
        source_N = column(self, "source")
        return dict(source=source_N // 2, start=1000 * (source_N % 2)).get(name, column(self, name))

    monkeypatch.setattr(Documents, "column", in_pairs)
    folder, _ = workdir
    units = {"train/topk": folder / "train" / "topk"}
    (entry,) = load_compared(["topk/resid_post.0-k4"], units, "--cluster.dictionaries")
    settings = {kind: kind() for kind in (ClusterConfig, MeshConfig)}
    activity_of = open_texts(SimpleNamespace(inputs={"capture": folder / "capture"}, configs=settings), [entry])
    activity, text_N = activity_of(entry)
    store = Store.open(folder / "capture")
    rows = store.rows("train", "resid_post.0")
    piece_N, position_N, _ = store.tokens(rows)
    of_text_N, start_N = (store.documents.column(name)[piece_N] for name in ("source", "start"))
    order_N = np.lexsort((start_N + position_N, of_text_N))
    assert (np.diff(rows[order_N]) < 0).any()
    np.testing.assert_array_equal(text_N, of_text_N[order_N])
    assert len(np.unique(text_N)) < len(np.unique(piece_N))
    dictionary = entry.load().with_sink_norms(store.max_norm)
    f_NxF = np.asarray(dictionary.encode(store.read("resid_post.0", rows[order_N]).astype(np.float32)))
    np.testing.assert_array_equal(activity.f_NxF.toarray() != 0, f_NxF != 0)


def test_without_a_store_the_model_reads_the_text(workdir, tmp_path):
    """A dictionary's folder, in another workdir: its firings are on text that the model reads."""
    folder, flags = workdir
    dictionary = f"--cluster.dictionaries={folder / 'train' / 'topk' / 'resid_post.0-k8'}"
    assert command.run(["cluster"], "", ["test", *flags, f"--workdir={tmp_path}", dictionary]) == 0
    (grouped,) = load_results(tmp_path / "cluster").dictionaries
    assert grouped.tokens > 300 and grouped.features > 0
    # Statement 3 of WORKSPACE.md, what must hold: a hash covers what the code reads, no more.
    assert settings_read.never_read("cluster") <= set()


@pytest.mark.parametrize(("target", "is_stored"), [("resid_post.1", True), ("mlp_out.0", False)])
def test_a_store_without_a_transcoders_target_is_not_read(workdir, monkeypatch, target, is_stored):
    """Which tokens are sinks there, the model has to tell."""
    folder, _ = workdir
    units = {"train/topk": folder / "train" / "topk"}
    (entry,) = load_compared(["topk/resid_post.0-k4"], units, "--cluster.dictionaries")
    entry = dataclasses.replace(entry, config=dataclasses.replace(entry.config, target=target))
    settings, read, used = {kind: kind() for kind in (ClusterConfig, MeshConfig)}, [], []
    monkeypatch.setattr(cluster_run, "read_run_text", lambda run, others, *more: read.append(others))
    rows = Store.rows
    monkeypatch.setattr(Store, "rows", lambda self, *names: used.append(names) or rows(self, *names))
    activity_of = open_texts(SimpleNamespace(inputs={"capture": folder / "capture"}, configs=settings), [entry])
    assert read == ([] if is_stored else [[entry]])
    if is_stored:
        activity_of(entry)
        assert used == [("train", "resid_post.0", target)]


@pytest.mark.parametrize("name", ["topk/resid_post.0-k3", "nowhere/at/all"])
def test_dictionaries_that_are_not_there(workdir, capsys, name):
    _, flags = workdir
    assert command.run(["cluster"], "", ["test", *flags, f"--cluster.dictionaries={name}"]) == 2
    assert name.split("/")[-1] in capsys.readouterr().err

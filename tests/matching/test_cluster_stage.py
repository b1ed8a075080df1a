"""The stage ``cluster`` as a program: a stack of seeds, with a store and without one."""

from types import SimpleNamespace

import pytest
import runs

from saejax import load_results
from saejax.matching.clusters.report import sections
from saejax.matching.clusters.run import GroupedFeatures
from saejax.page import style
from saejax.page.blocks import Picture
from saejax.runner import command

pytestmark = pytest.mark.usefixtures("single_device")


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    """A workdir with two seeds of a dictionary, grouped; the flags of its run."""
    folder = tmp_path_factory.mktemp("clustered")
    flags = runs.small_flags(
        *inputs, folder, train__kinds="topk", train__seed="1,2", cluster__dictionaries="topk", cluster__tokens=2000,
    )  # fmt: skip
    assert command.run(["capture", "train", "cluster"], "", ["test", *flags]) == 0
    return folder, flags


def test_members_are_grouped_in_every_view(workdir):
    folder, _ = workdir
    results = load_results(folder / "cluster")
    first, second = results.dictionaries
    assert [one.name for one in results.dictionaries] == ["topk/seed1", "topk/seed2"] and first.tokens > 300
    assert {one.view for one in first.groupings} == {"coactivation", "decoder"} and not first.without
    assert not second.without
    table = GroupedFeatures.load(folder / "cluster" / "000-topk-seed1-groups.parquet")
    for one in first.groupings:
        feature_F, group_F = (column[table.view == one.view] for column in (table.feature, table.group))
        assert len(feature_F) == one.features and (group_F >= 0).sum() == one.grouped
        assert len(set(group_F[group_F >= 0].tolist())) == one.count
        sets = [set(feature_F[group_F == group].tolist()) for group in range(one.count)]
        assert all(set(group.features) in sets for group in one.largest)
        assert 0.5 <= one.bar <= 1 and all(group.stable == (group.overlap > one.bar) for group in one.largest)


def test_the_report_has_them_and_nothing_is_done_twice(workdir, capsys):
    folder, flags = workdir
    results = load_results(folder / "cluster")
    found = SimpleNamespace(each=lambda kind: {"": results})
    drawn = []

    def draw(name, figure, caption, alt):
        drawn.append(alt)
        return Picture(name, style.inline(style.save(figure, folder, name), name, alt), caption, alt)

    (section,) = sections(found, draw)
    told = "\n".join(block.markdown() for block in section.blocks)
    assert (folder / "clusters.png").exists() and "firing together" in drawn[0]
    assert "Groups of topk/seed2" in told
    assert command.run(["cluster"], "", ["test", *flags]) == 0
    assert "cluster: done before, unchanged" in capsys.readouterr().out


def test_without_a_store_the_model_reads_the_text(workdir, tmp_path):
    """A dictionary's folder, in another workdir: the views are of text that the model reads."""
    folder, flags = workdir
    dictionary = f"--cluster.dictionaries={folder / 'train' / 'topk' / 'seed2'}"
    assert command.run(["cluster"], "", ["test", *flags, f"--workdir={tmp_path}", dictionary]) == 0
    (grouped,) = load_results(tmp_path / "cluster").dictionaries
    assert grouped.tokens > 300 and {each.view for each in grouped.groupings} == {"coactivation", "decoder"}


@pytest.mark.parametrize(
    "flag, said", [("--cluster.dictionaries=topk/seed3", "seed3"), ("--cluster.dictionaries=nowhere/at/all", "nowhere")]
)
def test_dictionaries_that_are_not_there(workdir, capsys, flag, said):
    _, flags = workdir
    assert command.run(["cluster"], "", ["test", *flags, flag]) == 2
    assert said in capsys.readouterr().err

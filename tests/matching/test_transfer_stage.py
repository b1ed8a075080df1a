"""The stage ``transfer`` as a program: layers and sizes of a tiny model, copies, and a model of another tokenizer."""

import csv
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import settings_read
import trained_stack

from saejax import load_results
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary, save_dictionary
from saejax.files import write_json
from saejax.links import write_link
from saejax.matching.match import STEP
from saejax.matching.track.settings import TrackConfig
from saejax.matching.transfer.chains import FeaturePairs
from saejax.runner import command
from saejax.runner.command_line import read_configs, stage_flags
from saejax.runner.registry import all_stages
from saejax.stages.identities import hash_folders
from saejax.stages.transfer import report

pytestmark = pytest.mark.usefixtures("single_device")


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    changes = dict(transfer__tokens=600, transfer__measures="decoder,encoder,activity")
    folder, flags = trained_stack.copy(inputs, tmp_path_factory, transfer__dictionaries="topk", **changes)
    assert command.run(["transfer"], "", ["test", *flags]) == 0
    return folder, flags


def live(folder, each):
    """Which features fire on held-out text, from dense activations."""
    dictionary, store = load_dictionary(folder / "train" / each.name), Store.open(folder / "capture")
    f_BxF = np.asarray(dictionary.encode(store.read(each.site, store.rows("held_out", each.site))))
    return np.asarray(dictionary.fires(f_BxF)).any(0)


def test_every_two_members_are_compared_and_pairs_of_features_written(workdir):
    folder, _ = workdir
    results = load_results(folder / "transfer")
    live_of = {each.name: live(folder, each) for each in results.dictionaries}
    assert len(results.dictionaries) == 4 and len({(pair.first, pair.second) for pair in results.pairs}) == 6
    for pair in results.pairs:
        assert pair.measures.keys() == {"decoder", "encoder", "activity"} and pair.tokens > 200
        for both in pair.measures.values():
            for scores in (both.scores, both.null):
                assert -1 <= scores.matched.low <= scores.matched.mean <= scores.matched.high <= 1.000001
                assert scores.gap <= STEP + 1e-6
        decoders = [load_dictionary(folder / "train" / name).W_dec_FxD[...] for name in (pair.first, pair.second)]
        first, second = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in map(np.asarray, decoders))
        decoder = pair.measures["decoder"]
        cosine_FxG = first[live_of[pair.first]] @ second[live_of[pair.second]].T
        assert abs(decoder.scores.nearest.mean - cosine_FxG.max(1).mean()) < 1e-5
        if pair.first.split("-")[0] == pair.second.split("-")[0]:  # of one site
            assert decoder.scores.matched.low > decoder.null.matched.high
    assert [(len(chains.dictionaries), chains.measure) for chains in results.chains] == [(2, "decoder")]
    # Scores and chains again, from the pairs that were written.
    first, *_ = (FeaturePairs.load(path) for path in sorted((folder / "transfer").glob("*-decoder.parquet")))
    assert sorted(set(first.second.tolist())) == [1, 2, 3] and len(first.feature) == 3 * 128
    values, scores = first.value[first.second == 1], results.pairs[0].measures["decoder"].scores
    count = min(live_of[each.name].sum() for each in results.dictionaries[:2])
    assert abs(np.nansum(values) / count - scores.matched.mean) < 1e-5
    assert abs((values >= 0.7).sum() / count - scores.shared.mean) < 1e-9
    (chains,) = results.chains
    last = [each.name for each in results.dictionaries].index(chains.dictionaries[1])
    assert sum(chains.lengths.values()) == (first.value[first.second == last] >= 0.7).sum()
    assert sum(chains.lengths_null.values()) == (first.null_value[first.second == last] >= 0.7).sum()
    rows = list(csv.DictReader((folder / "transfer" / "pairs.csv").open()))
    assert len(rows) == 18 and {row["measure"] for row in rows} == {"decoder", "encoder", "activity"}


def test_dead_features_are_left_out_before_evaluate_has_run_and_by_its_figures_of_this_dictionary(workdir, tmp_path):
    """What evaluate measured of a dictionary that was here before says nothing of this one's features."""
    folder, flags = workdir
    results = load_results(folder / "transfer")
    left_out = {each.name: int((~live(folder, each)).sum()) for each in results.dictionaries}
    assert any(left_out.values()) and all(each.dead_known for each in results.dictionaries)
    for pair in results.pairs:
        assert pair.measures["decoder"].left_out == (left_out[pair.first], left_out[pair.second])
    first, second = (each.name for each in results.dictionaries[:2])
    work = runs.copy_run(folder, tmp_path / "work")
    rates = work / "evaluate" / first
    rates.mkdir(parents=True)
    np.save(rates / "firing_rate.npy", np.r_[np.zeros(28), np.ones(100)])
    mark = (folder / "train" / first).resolve().name.rpartition("-")[2]
    flags = [*flags, f"--workdir={work}", f"--transfer.dictionaries={first},{second}", "--transfer.measures=decoder"]
    (work / "train" / f"topk-{16 * '0'}").mkdir()  # of another run, whose rates would be read as this one's
    for evaluated, count in (("0" * 16, left_out[first]), (mark, 28), ("0" * 16, left_out[first])):
        write_json(rates / "started.json", dict(depends_on=dict(needs={"train/topk": evaluated})))
        shutil.rmtree((work / "transfer").resolve())
        (work / "transfer").unlink()
        assert command.run(["transfer"], "", ["test", *flags]) == 0
        assert load_results(work / "transfer").pairs[0].measures["decoder"].left_out == (count, left_out[second])
        write_link(work / "train" / "topk", f"topk-{16 * '0'}")


def test_copies_are_found_wholly_and_what_was_done_is_kept(workdir, tmp_path, capsys):
    """A permuted copy shares all; a finished part is not compared again."""
    folder, flags = workdir
    name = load_results(folder / "transfer").dictionaries[0].name
    original = load_dictionary(folder / "train" / name)
    order = np.random.default_rng(0).permutation(original.config.n_features)
    arrays = original.arrays | {name: original.arrays[name][..., order] for name in ("W_enc_DxF", "b_enc_F")}
    arrays["W_dec_FxD"] = original.arrays["W_dec_FxD"][order]
    save_dictionary(tmp_path / "copy", Dictionary(original.config, original.matmul_dtype, **arrays))
    flags = [
        *flags,
        f"--workdir={tmp_path / 'work'}",
        f"--transfer.dictionaries={folder / 'train' / name},{tmp_path / 'copy'}",
        "--transfer.reconstruction=true",
    ]
    assert command.run(["transfer"], "", ["test", *flags]) == 0
    assert "compared with their dead features, for want of held-out text: " in capsys.readouterr().out
    results = load_results(tmp_path / "work" / "transfer")
    (pair,) = results.pairs
    for measure in ("decoder", "encoder"):
        scores, null = pair.measures[measure].scores, pair.measures[measure].null
        assert scores.matched.mean > 0.9999 and scores.shared.mean == 1
        assert null.shared.mean < 0.2 and null.matched.mean < 0.7
    activity = pair.measures["activity"]
    assert activity.scores.shared.mean > 0.9 > activity.null.shared.mean + 0.1 and activity.ceiling > 0.9
    assert activity.compared[0] + activity.left_out[0] == original.config.n_features and activity.compared[0] > 5
    for onto in (pair.onto_second, pair.onto_first):
        for figure in ("explained_variance", "l0"):
            assert getattr(onto.direct, figure) == pytest.approx(getattr(onto.native, figure), abs=1e-4)
        assert onto.native.explained_variance > onto.direct_null.explained_variance + 0.2
        assert onto.affine.explained_variance > onto.affine_null.explained_variance + 0.2
        assert onto.into.rows == onto.back.rows > 100 and onto.into.r2 > 0.99
    (tmp_path / "work" / "transfer" / "done.json").unlink()
    capsys.readouterr()
    assert command.run(["transfer"], "", ["test", *flags]) == 0
    assert "kept from an earlier run" in capsys.readouterr().out
    assert load_results(tmp_path / "work" / "transfer") == results


def test_names_on_the_page_tell_dictionaries_apart():
    """Of other workdirs the folders that differ are shown; members of two kinds are called alike."""
    names = ["topk", "/home/ada/runs/seed1/train/topk", "/home/ada/runs/seed2/train/topk"]
    assert [*report._shorten(names).values()] == ["topk", "seed1/train/topk", "seed2/train/topk"]
    for members, shown in ((["topk/k4", "topk/k8"], ["k4", "k8"]), (["gated/k4", "topk/k4"], ["gated/k4", "topk/k4"])):
        figure = report.draw_heatmaps(members, dict(shared=np.eye(2)), "share")
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == shown


def test_labels_that_change_make_comparisons_anew(workdir):
    """Chains are called by the labels of their features, which this run makes or the workdir of a folder has."""
    folder, flags = workdir
    configs = read_configs(
        stage_flags(), ["test", *flags, "--interpret.dictionaries=topk", "--cluster.dictionaries=topk"]
    )
    for stage in ("transfer", "cluster", "track"):
        read = all_stages()[stage].units_read(configs | TrackConfig(dictionaries=("topk",)), "")
        assert {"interpret/topk", "atlas/topk"} < {*read}
    member = next((folder / "train" / "topk").glob("resid_post*")).name
    for name in ("topk", f"topk/{member}"):
        marks = []
        for label in ("one", "two"):
            labels = folder / "atlas" / "topk" / member / "labels.json"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text(label)
            marks.append(hash_folders([str(folder / "train" / name)]))
        assert marks[0] != marks[1] and marks[0][-1] == marks[1][-1]
    shutil.rmtree(folder / "atlas")


def test_bad_input(workdir, tmp_path, capsys):
    folder, flags = workdir
    first, second = (each.name for each in load_results(folder / "transfer").dictionaries[:2])
    short = tmp_path / "short.txt"
    short.write_text("One text.\n\nAnother one.\n\nA third.")
    broken = load_dictionary(folder / "train" / first)
    arrays = broken.arrays | dict(W_dec_FxD=broken.W_dec_FxD[...].at[3].set(jnp.nan))
    save_dictionary(tmp_path / "nan", Dictionary(broken.config, broken.matmul_dtype, **arrays))
    narrow = dataclasses.replace(broken.config, d_in=8, fingerprint="")
    save_dictionary(tmp_path / "narrow", Dictionary.initial(narrow, jax.random.key(0)))
    copies = f"--transfer.dictionaries={folder / 'train' / first},{folder / 'train' / second}"
    work = runs.copy_run(folder, tmp_path / "work")
    for message, changed in {
        "name two at least": [f"--transfer.dictionaries={first}"],
        "names topk/": [f"--transfer.dictionaries=topk,{first}"],
        "there is no member": ["--transfer.dictionaries=topk/none,topk"],
        "NaN or infinity": [f"--transfer.dictionaries={first},{tmp_path / 'nan'}"],
        "add activity to": [f"--transfer.dictionaries={first},{tmp_path / 'narrow'}", "--transfer.measures=decoder"],
        "share": [copies, f"--corpus.path={short}", "--corpus.held_out=0.5"],
        "expected one of decoder": ["--transfer.measures=colour"],
    }.items():
        assert command.run(["transfer"], "", ["test", *flags, f"--workdir={work}", *changed]) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert message in error


# Statement 3 of WORKSPACE.md, what must hold.
def test_what_is_declared_is_read(workdir):
    """Otherwise a changed setting would make again what is the same."""
    assert settings_read.never_read("transfer") <= set()

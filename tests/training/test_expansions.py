"""A list of expansions: a stack of each, one after the other, in one unit."""

import shutil

import numpy as np
import pytest
import runs

from saejax import load_dictionary, load_results, train
from saejax.dictionaries.cross_layer import FORM
from saejax.errors import UserError
from saejax.runner import command
from saejax.stages.train.report import training_curves
from saejax.training.settings import TrainConfig

pytestmark = pytest.mark.usefixtures("single_device")
STAGES = ["capture", "train", "evaluate"]
SEEDS = dict(train__kinds="topk", train__seed="1,2", task__behaviours="")


def go(stages, inputs, folder, **changes) -> int:
    return command.run(stages, "", ["program", *runs.small_flags(*inputs, folder, **SEEDS | changes)])


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    """Two seeds at two expansions, the wider first, through to their scores."""
    folder = tmp_path_factory.mktemp("expansions") / "run"
    assert go(STAGES, inputs, folder, train__expansion="4,2") == 0
    return folder


def test_it_has_the_bits_of_a_run_of_its_own(inputs, workdir, tmp_path):
    """Of the second, which follows the first in one process."""
    runs.copy_units(workdir, tmp_path / "run", "capture")
    assert go(["train"], inputs, tmp_path / "run", train__expansion=2) == 0
    for seed in (1, 2):
        together = load_dictionary(workdir / "train" / "topk" / f"expansion2-seed{seed}")
        alone = load_dictionary(tmp_path / "run" / "train" / "topk" / f"seed{seed}")
        assert together.config == alone.config and alone.config.n_features == 2 * alone.config.d_in
        for name, array in alone.arrays.items():
            np.testing.assert_array_equal(together.arrays[name], array, err_msg=name)


def test_all_are_scored_and_have_their_curves(workdir):
    trained, scores = (load_results(workdir / stage / "topk") for stage in ("train", "evaluate"))
    names = ["expansion4-seed1", "expansion4-seed2", "expansion2-seed1", "expansion2-seed2"]
    assert [one.name for one in trained.members] == [one.name for one in scores.members] == names
    curves = training_curves(workdir / "train" / "topk")
    assert len(curves) == 4 and all(curve.tokens[-1] == trained.tokens for curve in curves)


def test_a_stopped_run_goes_on_with_the_one_it_was_at(inputs, workdir, tmp_path, capsys):
    run = tmp_path / "run"
    runs.copy_run(workdir, run)
    unit = run / "train" / "topk"
    (unit / "done.json").unlink()  # as if the wider ones alone had been done
    shutil.rmtree(unit / "expansion2")
    for member in unit.glob("expansion2-*"):
        shutil.rmtree(member.resolve())
    capsys.readouterr()
    assert go(["train"], inputs, run, train__expansion="4,2") == 0
    output = capsys.readouterr().out
    assert "resuming topk at step" in output and "training topk: 2 members" in output
    assert runs.dictionary_checksums(run) == runs.dictionary_checksums(workdir)


def test_what_does_not_go_together_is_refused(workdir):
    for changes in (dict(expansion=(0,)), dict(expansion=(4, 4)), dict(features=(512,)), dict(form=FORM)):
        with pytest.raises(UserError, match="expansion"):
            TrainConfig(**dict(expansion=(4, 8)) | changes)
    assert [*TrainConfig(features=(64, 32)).each_size()] == ["features64", "features32"]
    assert [config.features_of(16) for config in TrainConfig(features=(64, 32)).each_size().values()] == [64, 32]
    for sizes in (dict(expansion=(2, 4)), dict(features=(64, 32))):
        with pytest.raises(UserError, match="make 2 dictionaries"):
            train(workdir / "capture", k=4, batch=64, **sizes)

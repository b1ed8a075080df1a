"""A run of another length goes on from what it has in common with one before, and ends with the bits of a new one."""

import dataclasses
from unittest.mock import MagicMock

import numpy as np
import pytest
from small_runs import assert_same_bits, make_stack
from small_stacks import D, first_device

import saejax
from saejax.activations.in_memory import Activations
from saejax.activations.manifest import CapturedModel
from saejax.errors import UserError
from saejax.files import write_json
from saejax.training import longer
from saejax.training.longer import go_on_from_earlier

QUICK = dict(k=4, features=64, batch=64, epochs=1, warmup=3, dead_tokens=64, resample_every=2)


@pytest.fixture(scope="module")
def acts():
    """Sparse sums of 60 directions at one site: an epoch of 16 steps."""
    rng, rows = np.random.default_rng(0), 1024
    codes = rng.exponential(size=(rows, 60)) * (rng.random((rows, 60)) < 0.1)
    values = (codes @ rng.normal(size=(60, D)) + 0.7).astype(np.float32)
    texts = [np.zeros(32, np.int32)] * (rows // 32)
    index = np.stack([np.arange(rows) // 32, np.arange(rows) % 32, np.zeros(rows)], axis=1).astype(np.int32)
    return Activations({"resid_post.0": values}, index, texts, 100.0, CapturedModel("made", "", "1"), bos=False)


def go(acts, folder=None, **changes):
    lines = []
    options = QUICK | dict(folder=folder, mesh=first_device(), on_progress=lines.append) | changes
    sae = saejax.train(acts, kind="topk", **options)
    return sae, "\n".join(lines)


def test_a_longer_run_in_its_folder_ends_with_the_same_bits(acts, tmp_path):
    go(acts, tmp_path)
    continued, lines = go(acts, tmp_path, epochs=2)
    assert f"going on from step 13 of a run of 16 steps in {tmp_path}" in lines and "resuming topk at step 13" in lines
    whole, lines = go(acts, epochs=2)
    assert "training topk" in lines
    assert_same_bits(continued.arrays, whole.arrays)
    # Shorter: its learning rate falls before anything that is kept.
    with pytest.raises(UserError, match="settings.train.epochs was 2, is 1; steps was 32, is 16"):
        go(acts, tmp_path)


def test_why_a_run_is_trained_from_the_start(tmp_path, monkeypatch):
    run = dict(settings=dict(epochs=2, k=[4]), steps=12, members=["a"])
    for name, changes in dict(shorter=dict(steps=6), other=dict(members=["b"], steps=6)).items():
        for step in (3, 5, 6):
            (tmp_path / name / "checkpoints" / str(step)).mkdir(parents=True)
            (tmp_path / name / "checkpoints" / str(step) / "array").touch()
        write_json(tmp_path / name / "checkpoints" / "run.json", run | changes)
        (tmp_path / name / "metrics.jsonl").touch()

    def lines(stack, *earlier, name="new"):
        say, folder = MagicMock(), tmp_path / name
        folder.mkdir(exist_ok=True)
        go_on_from_earlier(stack, run, folder, [tmp_path / name for name in earlier], say)
        return "".join(call.args[0] for call in say.call_args_list)

    stack = make_stack("standard")
    assert lines(stack, "other") == ""
    rising = make_stack("standard", penalty_warmup=0.5)
    assert "trained from the start: --train.penalty_warmup is a share of all steps" in lines(rising, "shorter")
    falls = dataclasses.replace(stack, config=dataclasses.replace(stack.config, decay=0.7))
    assert "has no checkpoint from before its learning rate fell" in lines(falls, "shorter")
    assert "going on from step 5 of a run of 6 steps" in lines(stack, "shorter", "other")
    assert sorted(path.name for path in (tmp_path / "new" / "checkpoints").iterdir()) == ["5", "run.json"]
    assert lines(stack, "shorter") == "", "it has begun"
    (tmp_path / "new" / "checkpoints" / "run.json").unlink()  # killed just before it was written
    assert "going on from step 5" in lines(stack, "shorter") and lines(stack, "shorter") == ""
    no_penalty = make_stack("topk", penalty_warmup=0.5, save_every=3)
    assert lines(no_penalty, "shorter", name="topk").endswith("shorter; dictionaries are saved after step 5 only")
    (tmp_path / "shorter" / "metrics.jsonl").unlink()
    assert "going on" in lines(stack, "shorter", name="no_records")
    with monkeypatch.context() as full:
        full.setattr(longer.shutil, "copytree", MagicMock(side_effect=longer.shutil.Error("no space")))
        assert "from the start: the checkpoint in" in lines(stack, "shorter", name="full")

"""A cross-layer transcoder trained straight from the model by two processes: as by one, and killed on the way."""

import time

import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

SETTINGS = dict(
    train__source="model", capture__backend="jax", train__form="cross_layer_transcoder", train__sites="mlp_in.0-1",
    train__kinds="batchtopk", train__buffer_rows=200, train__epochs=3, train__checkpoint_every=2,
    train__state_dtype="float64",
)  # fmt: skip
SET = ("train", "batchtopk")
X64 = dict(JAX_ENABLE_X64="1")


def written(folder):
    """The bytes of the set's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.joinpath(*SET).glob("W_*.safetensors"))}


@pytest.mark.slow  # seven processes
def test_two_processes_train_as_one_and_killed_they_end_with_the_same_bytes(inputs, tmp_path):
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    shared = dict(SETTINGS, mesh__model=2)
    runs.finish(runs.start("train", runs.small_flags(*inputs, one, **SETTINGS), **X64))
    for process in runs.start_pair("train", runs.small_flags(*inputs, two, **shared), **X64):
        runs.finish(process)
    pair = runs.start_pair("train", runs.small_flags(*inputs, killed, **shared), **X64)
    checkpoints = killed.joinpath(*SET, "checkpoints")
    while not any(path.name.isdigit() for path in checkpoints.glob("*")):
        assert all(process.poll() is None for process in pair), pair[0].communicate()[0]
        time.sleep(0.01)
    for process in pair:
        process.kill()
    for process in pair:
        process.communicate()
    assert not written(killed)
    again = [runs.finish(each) for each in runs.start_pair("train", runs.small_flags(*inputs, killed, **shared), **X64)]
    assert any("resuming batchtopk at step" in line for line in again)
    assert written(killed) == written(two) and len(written(two)) == 4
    for name in written(one):
        first, second = (load_file(folder.joinpath(*SET, name)) for folder in (one, two))
        assert first.keys() == second.keys()
        for array in first:
            off = np.linalg.norm(second[array] - first[array])  # what the model gives is fp32
            assert off <= 1e-5 * np.linalg.norm(first[array]), f"{name} {array}"

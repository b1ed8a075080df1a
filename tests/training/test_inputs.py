"""Resident and streamed inputs give the same training, bit for bit."""

import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from runs import finish, start
from small_runs import ORDER, STEPS, Rows, assert_same_bits, go, make_stack, resident, streamed

sys.path.append(str(Path(__file__).parent.parent / "activations"))
import known_store

from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig
from saejax.training import inputs
from saejax.training.stack import TrainStack


@pytest.mark.parametrize("make_batches", [streamed, resident])
def test_any_batch_can_be_asked_for(make_batches):
    """Steps in any order, and the same one twice, give the rows of that step."""
    store = Rows()
    batches = make_batches(make_stack(), store)
    for step in (3, 4, 0, STEPS - 1, STEPS - 1):
        (x_SxBxD,) = batches.batch(step)
        np.testing.assert_array_equal(x_SxBxD[0], store.read("resid_post.1", ORDER.rows(step)))


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ((1, 8, 1), dict(form="skip_transcoder", sites=("mlp_in.0",))),
        ((2, 2, 2), dict(sites=("resid_post.0", "resid_post.1"))),
        ((2, 2, 2), dict(learning_rate=(1e-3, 2e-3))),
    ],
    ids=["data", "sites", "sweep"],
)
def test_resident_equals_streamed_on_meshes(tmp_path, mesh, changes):
    stack, store = make_stack("batchtopk", make_mesh(MeshConfig(*mesh)), **changes), Rows(ml_dtypes.bfloat16)
    expected = go(tmp_path / "streamed", stack, store=store)
    assert_same_bits(expected, go(tmp_path / "resident", stack, resident, store=store))
    arrays = resident(stack, store).arrays
    assert arrays[0].dtype == ml_dtypes.bfloat16 and arrays[0].sharding == stack.batch_sharding
    per_device = sum(part.addressable_shards[0].data.nbytes for part in arrays)
    assert inputs.resident_bytes(stack, store, len(store.values)) == per_device


def test_what_fits_is_resident_and_what_does_not_is_streamed_or_refused(monkeypatch):
    store = Rows()

    def made(free, mode="auto", platform="gpu"):
        monkeypatch.setattr(inputs, "free_bytes", lambda mesh: free)
        monkeypatch.setattr(TrainStack, "platform", platform)
        return type(inputs.open_store(make_stack(input=mode, products="dense"), store))

    size = store.values.nbytes
    assert made(3 * size) is inputs.ResidentBatches and made(2 * size) is inputs.StreamedBatches
    assert made(3 * size, platform="cpu") is inputs.StreamedBatches
    assert made(2 * size, "resident") is inputs.ResidentBatches
    assert made(3 * size, "streamed") is inputs.StreamedBatches
    with pytest.raises(UserError, match="would put 0.00 GB of activations on each device"):
        made(size - 1, "resident")


SHARDS, FILES = 5000, 256
TRAIN = f"""
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
from saejax.runner.config import Configs
from saejax.settings import MeshConfig, TrainConfig
from saejax.training.train import run_train
from saejax.runner.workspace import Run
settings = dict(sites=("resid_post.1",), batch=512, epochs=1, k=(2,), max_steps=8, input="streamed")
configs = Configs(MeshConfig(), TrainConfig(**settings))
run = Run("train", "topk", Path(sys.argv[2]), configs, dict(capture=Path(sys.argv[1])))
print("trained", run_train(run).steps)
"""


@pytest.mark.slow
def test_a_store_of_more_shards_than_files_may_be_open_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # of 25,000 small files
    lengths = known_store.LENGTHS * (2 * SHARDS // sum(known_store.LENGTHS) + 1)
    written = known_store.write(tmp_path / "store", shard_rows=2, lengths=lengths)
    assert written.store.manifest.shards >= SHARDS
    (tmp_path / "run").mkdir()
    assert "trained 8" in finish(start(TRAIN, [str(tmp_path / "store"), str(tmp_path / "run")]))

"""Resident and streamed inputs give the same training, bit for bit, wherever it is interrupted."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from every_kind import KINDS
from small_runs import ORDER, STEPS, Rows, go, make_stack, resident, streamed

from saejax.errors import Interrupted, UserError
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig
from saejax.training import inputs
from saejax.training.checkpoints import Checkpoints
from saejax.training.stack import TrainStack


def assert_same_bits(a, b):
    for leaf_a, leaf_b in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf_a), np.asarray(leaf_b))


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


@pytest.mark.parametrize("kind", KINDS)
def test_resident_equals_streamed_also_when_interrupted(tmp_path, kind):
    stack = make_stack(kind)
    expected = go(tmp_path / "streamed", stack)
    with pytest.raises(Interrupted, match=f"stopped at step 3 of {STEPS}"):
        go(tmp_path / "broken", stack, resident, stop_after=3)
    assert_same_bits(expected, go(tmp_path / "broken", stack, resident))
    assert losses(tmp_path / "streamed") == losses(tmp_path / "broken")


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
    mesh = make_mesh(MeshConfig(**dict(zip(("member", "data", "model"), mesh, strict=True))))
    stack, store = make_stack("batchtopk", mesh, **changes), Rows(ml_dtypes.bfloat16)
    expected = go(tmp_path / "streamed", stack, store=store)
    assert_same_bits(expected, go(tmp_path / "resident", stack, resident, store=store))
    arrays = resident(stack, store).arrays
    assert arrays[0].dtype == ml_dtypes.bfloat16 and arrays[0].sharding == stack.batch_sharding
    per_device = sum(part.addressable_shards[0].data.nbytes for part in arrays)
    assert inputs.resident_bytes(stack, store, len(store.values)) == per_device


@pytest.mark.parametrize("step", [1, 5])
def test_nan_stops_at_its_step(tmp_path, step):
    store = Rows()
    store.values[ORDER.rows(step - 1)[0]] = np.nan
    with pytest.raises(UserError, match=f"at step {step}:"):
        go(tmp_path, make_stack(checkpoint_every=3, log_every=1000), resident, store=store)
    saved = Checkpoints(tmp_path / "checkpoints").latest_step
    assert saved == ((step - 1) // 3 * 3 or None)


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

"""Resident and streamed inputs give the same training, bit for bit."""

import jax
import ml_dtypes
import numpy as np
import pytest
from small_runs import ORDER, STEPS, Rows, assert_same_bits, go, make_stack, resident, streamed
from small_stacks import B, D

from benchmarks.collectives import sent_bytes
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
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
        pytest.param((1, 8, 1), dict(form="skip_transcoder", sites=("mlp_in.0",)), marks=pytest.mark.slow),  # as below
        ((2, 2, 2), dict(form="transcoder", sites=("mlp_in.0", "mlp_in.1"))),
        ((2, 2, 2), dict(learning_rate=(1e-3, 2e-3))),
    ],
    ids=["data", "sites", "sweep"],
)
def test_resident_equals_streamed_on_meshes(tmp_path, mesh, changes):
    stack, store = make_stack("batchtopk", make_mesh(MeshConfig(*mesh)), **changes), Rows(ml_dtypes.bfloat16)
    expected = go(tmp_path / "streamed", stack, store=store)
    assert_same_bits(expected, go(tmp_path / "resident", stack, resident, store=store))
    arrays = resident(stack, store).arrays
    assert arrays[0].dtype == ml_dtypes.bfloat16
    shares = mesh[1] * mesh[2] * (mesh[0] if len(stack.sites) > 1 else 1)  # of rows, of their widths, and of sites
    assert {shard.data.nbytes for shard in arrays[0].addressable_shards} == {arrays[0].nbytes // shares}
    per_device = sum(part.addressable_shards[0].data.nbytes for part in arrays)
    assert inputs.resident_bytes(stack, store, len(store.values)) == per_device


def test_devices_along_model_send_one_another_the_batch_alone():
    """Each has a part of all vectors, and a step needs whole ones of its batch."""
    stack = make_stack(mesh=make_mesh(MeshConfig(model=8)))
    rows = jax.ShapeDtypeStruct((1, 4096, D), np.uint16, sharding=stack.rows_sharding(D))
    take = inputs.ResidentBatches(stack, (), lambda step: np.zeros((1, B)))._take
    compiled = take.lower((rows,), jax.ShapeDtypeStruct((1, B), np.int32)).compile()
    assert 0 < sum(sent_bytes(compiled.as_text(), 8, 8).values()) <= B * D * 4


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

"""Resident and streamed inputs give the same training, bit for bit, wherever it is interrupted."""

import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from every_kind import KINDS
from small_runs import ORDER, STEPS, Rows, go, make_trainer, resident, site_parts

from saejax.errors import Interrupted, UserError
from saejax.parallel.mesh import make_mesh
from saejax.settings import MeshConfig
from saejax.training import inputs
from saejax.training.checkpoints import Checkpoints
from saejax.training.placement import resident_bytes


def assert_same_bits(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


@pytest.mark.parametrize("kind", KINDS)
def test_resident_equals_streamed_also_when_interrupted(tmp_path, kind):
    trainer = make_trainer(kind)
    expected = go(tmp_path / "streamed", trainer)
    source = resident(trainer, Rows())
    with pytest.raises(Interrupted, match=f"stopped at step 5 of {STEPS}"):
        go(tmp_path / "broken", trainer, lambda *args: source, every=5, stop_after=3)  # the third runs up to step 5
    assert_same_bits(expected, go(tmp_path / "broken", trainer, lambda *args: source))
    assert losses(tmp_path / "streamed") == losses(tmp_path / "broken")


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
    trainer, store = make_trainer("batchtopk", mesh, **changes), Rows(ml_dtypes.bfloat16)
    expected = go(tmp_path / "streamed", trainer, store=store)
    assert_same_bits(expected, go(tmp_path / "resident", trainer, resident, store=store))
    held = resident(trainer, store).parts[0]
    assert held.dtype == ml_dtypes.bfloat16 and held.sharding == trainer.batch_sharding
    per_device = sum(part.addressable_shards[0].data.nbytes for part in resident(trainer, store).parts)
    assert resident_bytes(trainer, store, site_parts(trainer), len(store.values)) == per_device


def test_one_compilation_whatever_the_number_of_steps(tmp_path):
    trainer, made = make_trainer(), []

    def source(*args):
        made.append(resident(*args))
        return made[0]

    go(tmp_path, trainer, source, every=5)
    assert made[0].compiled._cache_size() == 1 and made[0]._count > 1


@pytest.mark.parametrize("step", [1, 5])
def test_nan_stops_at_its_step(tmp_path, step):
    store = Rows()
    store.values[ORDER.rows(step - 1)[0]] = np.nan
    with pytest.raises(UserError, match=f"at step {step}:"):
        go(tmp_path, make_trainer(), resident, store=store, every=3, log_every=1000)
    saved = Checkpoints(tmp_path / "checkpoints").latest_step
    assert saved == ((step - 1) // 3 * 3 or None)


def test_what_fits_is_resident_and_what_does_not_is_streamed_or_refused(monkeypatch):
    store = Rows()

    def made(free, input="auto", before="", on_cpu=False):
        monkeypatch.setattr(inputs, "free_bytes", lambda mesh: free)
        monkeypatch.setattr(inputs, "_on_cpu", lambda mesh: on_cpu)
        trainer = make_trainer(input=input)
        return type(inputs.make_input(trainer, store, site_parts(trainer), 0, before))

    size = store.values.nbytes
    assert made(3 * size) is inputs.Resident and made(2 * size) is inputs.Streamed
    assert made(3 * size, on_cpu=True) is inputs.Streamed
    assert made(2 * size, "resident") is inputs.Resident and made(3 * size, "streamed") is inputs.Streamed
    assert made(2 * size, before="resident") is inputs.Resident and made(3 * size, before="streamed") is inputs.Streamed
    with pytest.raises(UserError, match="would put 0.00 GB of activations on each device"):
        made(size - 1, "resident")


def test_a_slow_step_makes_short_programs(monkeypatch):
    trainer = make_trainer()
    source, state, times = resident(trainer, Rows()), trainer.initial_state(), iter([0, 9.0, 9.2, 10])
    monkeypatch.setattr(inputs, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    step = 0
    for expected in (1, 1, 2):  # the first compiles, the second takes 0.2 s
        state, _, count = source.advance(state, step, STEPS)
        assert count == expected
        step += count

"""The loop never waits for the step, compiles once, saves, resumes bit for bit, and stops on NaN and SIGTERM."""

import json

import jax
import numpy as np
import pytest
from small_stacks import make_trainer as make_small
from small_stacks import parts

from saejax.errors import Interrupted, UserError
from saejax.parallel import make_mesh
from saejax.settings import KINDS, MeshConfig
from saejax.training.checkpoints import Checkpoints
from saejax.training.loop import Metrics, train

D, B, STEPS = 16, 32, 12


def make_trainer(kind="topk", mesh=None, **changes):
    return make_small(kind, mesh, steps=STEPS, auxk=0.03, dead_tokens=64, **changes)


def data(first=0) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(STEPS, B, D)).astype(np.float32))[first:]


def go(folder, trainer, batches=None, stop_after=None, every=100, log_every=1):
    """Trains in ``folder`` from where it was; gives the final state."""
    checkpoints = Checkpoints(folder / "checkpoints")
    first = checkpoints.latest_step or 0
    state = checkpoints.restore(trainer.abstract_state) if first else trainer.initial_state()
    names = [member.name for member in trainer.members]
    metrics = Metrics(folder / "metrics.jsonl", first, B, log_every, STEPS, names, say=lambda line: None)
    seen = []

    def stopping():
        seen.append(1)
        return stop_after is not None and first + len(seen) >= stop_after

    batches = [parts(trainer, batch) for batch in (data(first) if batches is None else batches)]
    try:
        return train(trainer, state, batches, first, STEPS, metrics, checkpoints, every, stopping)
    finally:
        checkpoints.close()


class NotYet:
    """A metric that must not be read before the next step was dispatched."""

    def __init__(self, step, dispatched):
        self.step, self.dispatched = step, dispatched

    def __array__(self, dtype=None, copy=None):
        last = self.dispatched[-1]
        assert last > self.step or last == STEPS, f"step {self.step} was read while {last} was the newest dispatched"
        return np.ones(1, dtype)


def test_metrics_are_read_one_step_late(tmp_path):
    trainer = make_trainer()
    real_step, dispatched = trainer.step, []

    def step(state, batch):
        state, metrics = real_step(state, batch)
        dispatched.append(len(dispatched) + 1)
        return state, {name: NotYet(dispatched[-1], dispatched) for name in metrics}

    trainer.step = step
    go(tmp_path, trainer)
    assert len(dispatched) == STEPS
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == STEPS


def test_the_stand_in_catches_a_stall(tmp_path, monkeypatch):
    monkeypatch.setattr(Metrics, "push", lambda self, step, values: [np.asarray(v) for v in values.values()])
    with pytest.raises(AssertionError, match="was read while"):
        test_metrics_are_read_one_step_late(tmp_path)


def test_one_compilation(tmp_path):
    trainer = make_trainer()
    go(tmp_path, trainer)
    assert trainer.compiled._cache_size() == 1


@pytest.mark.parametrize(("kind", "stop_after"), [*((kind, 7) for kind in KINDS), ("topk", 1), ("topk", 11)])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, kind, stop_after):
    whole = go(tmp_path / "whole", make_trainer(kind))
    with pytest.raises(Interrupted, match=f"step {stop_after} of {STEPS}"):
        go(tmp_path / "broken", make_trainer(kind), stop_after=stop_after)
    resumed = go(tmp_path / "broken", make_trainer(kind))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    records = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "broken")
    ]
    assert [r["step"] for r in records[1]] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]


def test_restoring_onto_another_mesh_goes_on_from_the_same_state(tmp_path):
    trainer = make_trainer()
    with pytest.raises(Interrupted):
        go(tmp_path, trainer, stop_after=5)
    other = make_trainer(mesh=make_mesh(MeshConfig(data=2, model=4)))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, same = checkpoints.restore(other.abstract_state), checkpoints.restore(trainer.abstract_state)
    checkpoints.close()
    assert state.params["W_enc_DxF"].sharding.shard_shape((1, D, 64)) == (1, D, 16)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(same)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    batches = data()
    batches[8][3, 2] = np.nan
    with pytest.raises(UserError, match="at step 9"):
        go(tmp_path, make_trainer(), batches, every=4)
    assert Checkpoints(tmp_path / "checkpoints").latest_step == 8


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    batches = data()
    batches[6][0, 0] = np.nan
    with pytest.raises(UserError, match="is nan at step 8"):
        go(tmp_path, make_trainer(), batches, every=4, log_every=1000)
    assert Checkpoints(tmp_path / "checkpoints").latest_step == 4


def test_a_damaged_checkpoint_is_named(tmp_path):
    trainer = make_trainer()
    with pytest.raises(Interrupted):
        go(tmp_path, trainer, stop_after=3)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 300:
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be restored"):
        go(tmp_path, trainer)


def test_nan_names_the_member_and_keeps_the_others_apart(tmp_path):
    trainer = make_trainer(learning_rate=(1e-3, 1e30))
    with pytest.raises(UserError, match="of member learning_rate1e\\+30 is (nan|inf|-inf) at step"):
        go(tmp_path, trainer, every=100)


def test_every_member_has_its_own_metrics(tmp_path):
    go(tmp_path, make_trainer(k=(2, 4)), log_every=4)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["member"], r["l0"]) for r in records] == [
        (step, f"k{k}", k) for step in (4, 8, 12) for k in (2, 4)
    ]

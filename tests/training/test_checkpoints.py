"""Checkpoints: written while training goes on, the newest kept, of one configuration only."""

import jax
import numpy as np
import pytest
from small_stacks import first_device

from saejax.errors import UserError
from saejax.parallel.mesh import sharding
from saejax.training.checkpoints import Checkpoints


def state_of(value, size=10) -> dict:
    return dict(values=jax.device_put(np.full(size, value, np.float32), sharding(first_device())))


def kept(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir())


class Writing:
    """In place of Orbax's answer to a save: tells when it is waited for."""

    def __init__(self, told, step, error=None):
        self.told, self.step, self.error = told, step, error

    def result(self):
        self.told.append(f"waited for {self.step}")
        if self.error:
            raise self.error


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    told = []
    checkpoints = Checkpoints(tmp_path)

    def save_async(step, state, **rest):
        told.append(f"began {step}")
        return Writing(told, step)

    monkeypatch.setattr(checkpoints._checkpointer, "save_async", save_async)
    for step in (3, 6):
        checkpoints.save(step, state_of(step))
        told.append(f"trained after {step}")
    checkpoints.wait()
    expected = ["began 3", "trained after 3", "waited for 3", "began 6", "trained after 6", "waited for 6"]
    assert told == expected
    checkpoints.close()


def test_what_is_saved_is_the_state_before_its_buffers_are_donated(tmp_path, monkeypatch):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda value: value * 0 - 1, state), donate_argnums=0)
    state, given = state_of(7.0, 4_000_000), []
    with Checkpoints(tmp_path) as checkpoints:
        save_async = checkpoints._checkpointer.save_async
        monkeypatch.setattr(
            checkpoints._checkpointer,
            "save_async",
            lambda *args, **rest: given.append(args[1]) or save_async(*args, **rest),
        )
        checkpoints.save(1, state)
        jax.block_until_ready(overwrite(state))
        assert state["values"].is_deleted() and not given[0]["values"].is_deleted(), "on a CPU it is a copy"
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore(state_of(0.0, 4_000_000))["values"], 7.0)


@pytest.mark.parametrize(
    ("said", "told"),
    [("No space left on device", "the disk is full"), ("Disk quota exceeded", "the disk quota is used up")],
)
def test_a_disk_that_fills_later_is_one_clear_line(tmp_path, monkeypatch, said, told):
    checkpoints = Checkpoints(tmp_path)
    full = Writing([], 3, ValueError(f"RESOURCE_EXHAUSTED: ... {said}"))
    monkeypatch.setattr(checkpoints._checkpointer, "save_async", lambda *args, **rest: full)
    checkpoints.save(3, state_of(0))
    with pytest.raises(UserError, match=f"{told} while saving step 3 to"):
        checkpoints.save(6, state_of(0))
    checkpoints.save(6, state_of(0))
    with pytest.raises(UserError, match=f"{told} while saving step 6 to"):
        checkpoints.wait()
    checkpoints.save(9, state_of(0))
    with pytest.raises(KeyError), checkpoints:  # another error is not hidden by this one
        raise KeyError


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        with Checkpoints(tmp_path) as checkpoints:  # each by a process of its own
            checkpoints.save(step, state_of(step))
            checkpoints.wait()
    assert kept(tmp_path) == [4, 5]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step == 5 and checkpoints.restore(state_of(0))["values"][0] == 5
    checkpoints.close()


def test_checkpoints_of_another_configuration(tmp_path):
    run = dict(settings=dict(k=[32], batch=64), steps=10)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check_or_record_run(dict(other=1))
        checkpoints.check_or_record_run(run)  # nothing was saved yet
        checkpoints.save(1, state_of(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check_or_record_run(run)
        with pytest.raises(
            UserError, match=r"configuration: settings.k was \[32\], is \[16\]; steps was 10, is 11: giv"
        ):
            checkpoints.check_or_record_run(dict(settings=dict(k=[16], batch=64), steps=11))

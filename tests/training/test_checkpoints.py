"""Checkpoints: written while training goes on, the newest kept, of one configuration only."""

import concurrent.futures
import re

import jax
import numpy as np
import pytest
from runs import ROOT, finish, start
from small_stacks import batches, first_device, make_stack, run

from saejax import save_dictionary
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh, sharding
from saejax.parallel.settings import MeshConfig
from saejax.training.checkpoints import Checkpoints
from saejax.training.state import finish_dictionary


def state_of(value, size=10) -> dict:
    return dict(values=jax.device_put(np.full(size, value, np.float32), sharding(first_device())))


def test_what_is_saved_is_the_state_before_its_buffers_are_donated(tmp_path, monkeypatch):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda value: value * 0 - 1, state), donate_argnums=0)
    state, copies = state_of(7.0, 4_000_000), []
    with Checkpoints(tmp_path) as checkpoints:
        save = checkpoints._checkpointer.save_async
        recorded = lambda *args, **rest: copies.append(args[1]) or save(*args, **rest)  # noqa: E731
        monkeypatch.setattr(checkpoints._checkpointer, "save_async", recorded)
        checkpoints.save(1, state)
        jax.block_until_ready(overwrite(state))
        assert state["values"].is_deleted() and not copies[0]["values"].is_deleted(), "on a CPU it is a copy"
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore(state_of(0.0, 4_000_000))["values"], 7.0)


@pytest.mark.parametrize(
    ("error", "line"),
    [("No space left on device", "the disk is full"), ("Disk quota exceeded", "the disk quota is used up")],
)
def test_a_disk_that_fills_later_is_one_clear_line(tmp_path, monkeypatch, error, line):
    """Training goes on while a checkpoint is written: it fails at the next one, or where it is waited for."""
    checkpoints, full = Checkpoints(tmp_path), concurrent.futures.Future()
    full.set_exception(ValueError(f"RESOURCE_EXHAUSTED: ... {error}"))
    monkeypatch.setattr(checkpoints._checkpointer, "save_async", lambda *args, **rest: full)
    checkpoints.save(3, state_of(0))
    with pytest.raises(UserError, match=f"{line} while saving step 3 to"):
        checkpoints.save(6, state_of(0))
    checkpoints.save(6, state_of(0))
    with pytest.raises(UserError, match=f"{line} while saving step 6 to"):
        checkpoints.wait()
    checkpoints.save(9, state_of(0))
    with pytest.raises(KeyError), checkpoints:  # another error is not hidden by this one
        raise KeyError


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        with Checkpoints(tmp_path) as checkpoints:  # each by a process of its own
            checkpoints.save(step, state_of(step))
            checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["4", "5"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 5 and checkpoints.restore(state_of(0))["values"][0] == 5


def test_checkpoints_of_another_configuration(tmp_path):
    run = dict(settings=dict(k=[32], batch=64), steps=10)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check_or_record_run(dict(other=1))
        checkpoints.check_or_record_run(run)  # nothing was saved yet
        checkpoints.save(1, state_of(1))
    message = r"configuration: settings.k was \[32\], is \[16\]; steps was 10, is 11: giv"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check_or_record_run(run)
        with pytest.raises(UserError, match=message):
            checkpoints.check_or_record_run(dict(settings=dict(k=[16], batch=64), steps=11))
        (tmp_path / "run.json").write_text("[]")
        with pytest.raises(UserError, match="run.json is no JSON object: it is damaged"):
            checkpoints.check_or_record_run(run)


LINES = re.search(
    r"```python\n(import jax\nfrom orbax.*?)```", (ROOT / "docs" / "artifacts.md").read_text(), re.DOTALL
)[1]
PROGRAM = """
import sys
import numpy as np
from orbax.checkpoint import v1 as ocp
LINES
assert len(jax.devices()) == 1
np.savez(sys.argv[1], *jax.tree.leaves(state["params"]))
np.savez(sys.argv[2], **arrays)
"""


def test_what_eight_devices_trained_opens_on_one_with_orbax_alone(tmp_path):
    """By the lines of docs/artifacts.md."""
    stack = make_stack("batchtopk", make_mesh(MeshConfig(data=2, model=4)), auxk=0.03)
    state, _ = run(stack, batches(3))
    dictionary = finish_dictionary(stack, state, 0)
    assert len(dictionary.W_enc_DxF[...].sharding.device_set) == 8
    save_dictionary(tmp_path / "made", dictionary)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state)
    lines = LINES
    for name, place in {"checkpoints": "checkpoints", "dictionary/arrays": "made/arrays"}.items():
        assert f"RUN/train/topk/{name}" in lines
        lines = lines.replace(f"RUN/train/topk/{name}", str(tmp_path / place))
    places = [str(tmp_path / name) for name in ("state.npz", "dictionary.npz")]
    finish(start(PROGRAM.replace("LINES", lines), places))
    for array, expected in zip(np.load(places[0]).values(), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(array, expected)
    arrays = np.load(places[1])
    assert set(arrays) == set(dictionary.arrays)
    for name, array in dictionary.arrays.items():
        np.testing.assert_array_equal(arrays[name], array)

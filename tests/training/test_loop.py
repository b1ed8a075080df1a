"""The loop never waits for the step, compiles once, saves, resumes bit for bit, stops on NaN, and keeps its metrics."""

import dataclasses
import json
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import optax
import pytest
from every_kind import KINDS
from small_runs import ORDER, STEPS, Rows, assert_same_bits, go, make_stack, records, resident, streamed
from small_stacks import B, D, F, compiled

from saejax.config import Configs
from saejax.errors import Interrupted, UserError
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner.workspace import Run
from saejax.stages.train.run import _folders
from saejax.training import metrics as metrics_module
from saejax.training.checkpoints import Checkpoints
from saejax.training.loop import TrainFolders
from saejax.training.metrics import METRICS, Metrics, Wandb
from saejax.training.settings import TrainConfig
from saejax.training.state import abstract_state


class NotYet:
    """A metric that must not be read before the next step was dispatched."""

    def __init__(self, step, dispatched):
        self.step, self.dispatched = step, dispatched

    def __array__(self, dtype=None, copy=None):
        last = self.dispatched[-1]
        assert last > self.step or last == STEPS, f"step {self.step} was read while {last} was the newest dispatched"
        return np.ones(1, dtype)


def test_metrics_are_read_one_step_late_from_one_program(tmp_path):
    stack, dispatched = make_stack(decay=1.0), []  # which keeps no checkpoint before the last

    def step(state, hyper, batch):
        state, metrics = compiled(stack)(state, hyper, batch)
        dispatched.append(len(dispatched) + 1)
        return state, {name: NotYet(dispatched[-1], dispatched) for name in metrics}

    go(tmp_path, stack, step_fn=step)
    assert len(dispatched) == STEPS == len(records(tmp_path)) and compiled(stack)._cache_size() == 1


@pytest.mark.parametrize(
    ("kind", "stop_after", "products"),
    [
        ("topk", 1, "rows"),
        ("jumprelu", 7, "auto"),
        # They differ in their loss alone, of which the state knows nothing.
        *(pytest.param(k, 7, "auto", marks=pytest.mark.slow) for k in KINDS if k != "jumprelu"),
        pytest.param("topk", 7, "rows", marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, kind, stop_after, products):
    """From resident rows on with streamed ones, and with features that died and started again."""
    changes = dict(products=products, k=(1,), dead_tokens=2 * B)
    stack = make_stack(kind, resample_every=2, **changes)
    whole = go(tmp_path / "whole", stack)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_after} of {STEPS}"):
        go(tmp_path / "broken", stack, resident, stop_after=stop_after)
    assert_same_bits(go(tmp_path / "broken", stack), whole)
    assert [record["step"] for record in records(tmp_path / "broken")] == list(range(1, STEPS + 1))
    losses = [[record["loss"] for record in records(tmp_path / run)] for run in ("whole", "broken")]
    assert losses[0] == losses[1]
    if kind == "topk":
        without = go(tmp_path / "without", make_stack(kind, **changes))
        assert not np.array_equal(whole.params["W_dec_FxD"], without.params["W_dec_FxD"]), "features had died"


@pytest.mark.parametrize("zero", [pytest.param(False, marks=pytest.mark.slow), True])
def test_restoring_onto_another_mesh_goes_on_from_the_same_state(tmp_path, zero):
    stack = make_stack()
    with pytest.raises(Interrupted):
        go(tmp_path / "moved", stack, stop_after=5)
    on_other_mesh = make_stack(mesh=make_mesh(MeshConfig(data=2, model=4)), zero_optimizer=zero)
    with Checkpoints(tmp_path / "moved" / "checkpoints") as checkpoints:
        state, same = (checkpoints.restore(abstract_state(each)) for each in (on_other_mesh, stack))
    assert state.params["W_enc_DxF"].sharding.shard_shape((1, D, 64)) == (1, D, 16)
    moment = optax.tree.get(state.optimizer, "nu")["W_enc_DxF"]
    assert moment.sharding.shard_shape((1, D, 64)) == (1, D // 2 if zero else D, 16)
    assert_same_bits(state, same)
    # From there on both see the same batches, and end with the same numbers but for rounding.
    whole, moved = go(tmp_path / "whole", stack), go(tmp_path / "moved", on_other_mesh)
    for name, value in whole.params.items():
        a, b = np.asarray(value), np.asarray(moved.params[name])
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a), name
    losses = [[record["loss"] for record in records(tmp_path / run)] for run in ("whole", "moved")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("make_batches", "size", "step", "every", "log_every", "kept"),
    [
        pytest.param(streamed, np.nan, 4, 3, 1, 3, marks=pytest.mark.slow),
        (streamed, np.nan, 4, 3, 1000, 3),
        (resident, np.nan, 1, 3, 1000, None),
        pytest.param(resident, np.nan, 5, 3, 1000, 3, marks=pytest.mark.slow),
        # The loss of step 4 is finite, but what it makes of the parameters would not be.
        (streamed, 2e17, 4, 1, 1000, 3),
        pytest.param(streamed, 2e17, 4, 2, 1000, 2, marks=pytest.mark.slow),
        (streamed, 2e17, 4, 4, 1000, None),
    ],
)
def test_what_is_not_finite_stops_at_its_step_and_is_not_saved(
    tmp_path, make_batches, size, step, every, log_every, kept
):
    rows, stack = Rows(), make_stack(checkpoint_every=every, log_every=log_every)
    rows.values[ORDER.rows(step - 1) if size > 0 else (ORDER.rows(step - 1)[0], 2)] *= size
    fault = "gradient_norm is .*" if size > 0 else ""
    with pytest.raises(UserError, match=f"{fault} at step {step}: .* the last checkpoint is kept"):
        go(tmp_path, stack, make_batches, rows)
    assert Checkpoints(tmp_path / "checkpoints").latest_step == kept


def test_a_damaged_checkpoint_is_named(tmp_path):
    stack = make_stack()
    with pytest.raises(Interrupted):
        go(tmp_path, stack, stop_after=3)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 300:
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be restored"):
        go(tmp_path, stack)


def test_nan_names_the_member_and_keeps_the_others_apart(tmp_path):
    stack = make_stack(learning_rate=(1e-3, 1e30))
    with pytest.raises(UserError, match="of member learning_rate1e\\+30 is (nan|inf|-inf) at step"):
        go(tmp_path, stack)


@pytest.mark.parametrize(
    ("kind", "setting", "flag"),
    [
        ("standard", "l1", "l1"),
        ("jumprelu", "l0_coefficient", "jumprelu.l0_coefficient"),
        pytest.param("topk", "decorrelation", "decorrelation", marks=pytest.mark.slow),
        pytest.param("topk", "alignment", "alignment", marks=pytest.mark.slow),
        ("topk", "weight_decay", "weight_decay"),
    ],
)
def test_an_infinite_gradient_names_the_coefficient_that_made_it(tmp_path, kind, setting, flag):
    value = (1e30,) if setting in ("l1", "l0_coefficient") else 1e30
    with pytest.raises(UserError, match=f"lower --train.{flag};"):
        go(tmp_path, make_stack(kind, **{setting: value}))


def test_metrics_are_added_to_their_file(tmp_path, monkeypatch):
    """Never written again as a whole but where a run goes on; and what is in memory does not grow with the run."""
    held, sizes, path = [], [], tmp_path / METRICS
    write = Metrics.write

    def watched(metrics):
        before = path.read_bytes() if path.exists() else b""
        write(metrics)
        held.append(len(metrics.records))
        sizes.append(path.stat().st_size)
        assert path.read_bytes().startswith(before) and before != path.read_bytes()

    monkeypatch.setattr(Metrics, "write", watched)
    go(tmp_path, make_stack(checkpoint_every=2))
    assert held == [2] + [4] * (STEPS // 2 - 1) and sizes == sorted(set(sizes))
    assert [record["step"] for record in records(tmp_path)] == list(range(1, STEPS + 1))


def test_a_record_that_was_cut_off_is_made_again(tmp_path):
    with pytest.raises(Interrupted):
        go(tmp_path, make_stack(), stop_after=5)
    path = tmp_path / METRICS
    with path.open("a") as file:  # the disk was full, say, when the next records came
        file.write(path.read_text().splitlines()[-1].replace('"step": 5', '"step": 6') + '\n{"step": 7, "tok')
    go(tmp_path, make_stack())
    assert [record["step"] for record in records(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("content", ["{}\n", "[]\n", "cut\n", ""])
def test_damaged_or_missing_records_of_a_finished_training_are_named(tmp_path, content):
    path = tmp_path / METRICS
    path.write_text(content)
    with pytest.raises(UserError, match=rf"metrics.jsonl is .*: delete {tmp_path} and run the same command again"):
        Metrics(make_stack(), path, STEPS, lambda line: None)


def test_records_say_how_fast_it_goes(tmp_path, monkeypatch):
    """By a clock that stands at 10 s for each step: of two members, and their share of a device's peak."""
    stack, lines = make_stack("standard", k=(4,), seed=(1, 2), auxk=0.0), []
    monkeypatch.setattr(metrics_module, "peak_flops", lambda device, dtype: 1e6)
    ticks = iter([0.0, *(10.0 * (1 + i // 2) for i in range(100))])
    monkeypatch.setattr(metrics_module, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    metrics = Metrics(stack, tmp_path / METRICS, 0, lines.append)
    values = {name: np.ones(2) for name in ("loss", "l0", "explained_variance")}
    for step in (1, 2, 3):
        metrics.push(step, values)
    metrics.flush()
    first, *_, last = metrics.records
    assert "mfu" not in first and last["tokens_per_second"] == pytest.approx(B / 10)
    flops = 2 * 12 * B * D * F / 10  # encoder and decoder, once forwards and twice backwards, of both members
    assert last["tflop_per_second"] == pytest.approx(flops / 1e12, rel=1e-3)
    assert last["mfu"] == pytest.approx(flops / 1e6, rel=1e-3) and "of peak" in lines[-1]


def test_wandb_takes_every_record_of_every_member(tmp_path, monkeypatch):
    wandb, unit = MagicMock(), tmp_path / "train" / "topk"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (narrow, config), (wide, _) = TrainConfig(wandb="people/saes", expansion=(2, 4)).each_size().items()
    for size, started in ((narrow, "{}"), (narrow, "{}"), (wide, "{}"), (narrow, "{1}")):
        with Wandb(config, TrainFolders(unit, {}, tmp_path, size=size).logs, "topk", tmp_path, started) as writer:
            pass
    first, again, *others = (call.kwargs for call in wandb.init.call_args_list)
    assert (first["entity"], first["project"], first["name"]) == ("people", "saes", "topk")
    assert first["id"] == again["id"] not in [other["id"] for other in others]
    assert first["resume"] == "allow" and first["config"]["k"] == [32] and first["dir"] == str(tmp_path)
    run = wandb.init.return_value
    go(tmp_path, make_stack(k=(2, 4), log_every=6), wandb=writer)
    assert [call.kwargs["step"] for call in run.log.call_args_list] == [6, 6, STEPS, STEPS]
    assert run.finish.call_count == 4
    assert all(f"k{k}/loss" in call.args[0] for k, call in zip((2, 4), run.log.call_args_list, strict=False))
    written = [(record["step"], record["member"], record["l0"]) for record in records(tmp_path)]
    assert written == [(step, f"k{k}", k) for step in (6, 12) for k in (2, 4)], "every member has its own metrics"


def test_wandb_writes_to_the_workdir_of_a_unit(tmp_path):
    """To no folder of the unit, whose files do not change after the run."""
    run = Run("train", "topk", tmp_path / "train" / "topk", Configs(), {})
    run.folder.mkdir(parents=True)
    members = make_stack(k=(2, 4)).members
    apart = _folders(run, members)
    assert apart == TrainFolders.inside(run.folder, members) and apart.wandb == run.folder
    (run.folder / "started.json").write_text("{}")
    assert _folders(run, members) == dataclasses.replace(apart, wandb=tmp_path, started="{}")


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--train.wandb takes the package wandb, .* pip install 'saejax\[wandb\]'"):
        Wandb(TrainConfig(wandb="project"), tmp_path, "topk", tmp_path)


def test_seconds_are_those_of_the_last_record_and_go_on_after_a_kill(tmp_path):
    stack, path = make_stack(), tmp_path / METRICS
    lines = [json.dumps(dict(step=step, seconds=2.0 * step, member="")) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines) + lines[0][:9])  # the last line was cut off
    assert Metrics(stack, path, 3, print).seconds == 6.0
    assert Metrics(stack, path, 2, print).seconds == 4.0 and path.read_text() == "".join(lines[:2])
    path.unlink()
    assert Metrics(stack, path, 0, print).seconds == 0.0

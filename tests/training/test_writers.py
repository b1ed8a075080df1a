"""Runs of wandb hold what metrics.jsonl holds."""

import json
import sys
from unittest.mock import MagicMock

import pytest
from small_runs import STEPS, go, make_stack

from saejax.errors import UserError
from saejax.settings import TrainConfig
from saejax.training.metrics import METRICS, Metrics, Wandb


def test_wandb_takes_every_record(tmp_path, monkeypatch):
    wandb, unit = MagicMock(), tmp_path / "train" / "topk"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    unit.mkdir(parents=True)
    (unit / "started.json").write_text("{}")
    narrow, wide = TrainConfig(wandb="people/saes", expansions=(2, 4)).each_expansion()
    for config in (narrow, narrow, wide):
        with Wandb(config, unit, "topk") as writer:
            pass
    first, again, second = (call.kwargs for call in wandb.init.call_args_list)
    assert (first["entity"], first["project"], first["name"]) == ("people", "saes", "topk")
    assert first["id"] == again["id"] != second["id"] and first["resume"] == "allow" and first["config"]["k"] == [32]
    assert first["dir"] == second["dir"] == str(tmp_path)
    run = wandb.init.return_value
    go(tmp_path, make_stack(k=(2, 4), log_every=6), wandb=writer)
    assert [call.kwargs["step"] for call in run.log.call_args_list] == [6, 6, STEPS, STEPS]
    assert run.finish.call_count == 3
    assert all(f"k{k}/loss" in call.args[0] for k, call in zip((2, 4), run.log.call_args_list, strict=False))


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--train.wandb takes the package wandb, .* pip install 'saejax\[wandb\]'"):
        Wandb(TrainConfig(wandb="project"), tmp_path, "topk")


def test_seconds_are_those_of_the_last_record_and_go_on_after_a_kill(tmp_path):
    stack, path = make_stack(), tmp_path / METRICS
    lines = [json.dumps(dict(step=step, seconds=2.0 * step, member="")) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines) + lines[0][:9])  # the last line was cut off
    assert Metrics(stack, path, 3, print).seconds == 6.0
    assert Metrics(stack, path, 2, print).seconds == 4.0 and path.read_text() == "".join(lines[:2])
    path.unlink()
    assert Metrics(stack, path, 0, print).seconds == 0.0

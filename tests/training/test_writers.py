"""Runs of wandb hold what metrics.jsonl holds."""

import sys
import types

import pytest
from small_runs import STEPS, go, make_stack

from saejax.errors import UserError
from saejax.settings import TrainConfig
from saejax.training.metrics import Wandb


def config(**changes) -> TrainConfig:
    return TrainConfig(**changes)


class FakeWandb(types.ModuleType):
    """Records what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.finished = [], [], 0

    def Settings(self, **settings):
        return settings

    def init(self, **given):
        self.runs.append(given)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_takes_every_record(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "started.json").write_text("{}")
    for _ in range(2):
        with Wandb(config(wandb="people/saes"), tmp_path, "topk") as writer:
            pass
    (first, again) = wandb.runs
    assert (first["entity"], first["project"], first["name"]) == ("people", "saes", "topk")
    assert first["id"] == again["id"] and first["resume"] == "allow" and first["config"]["k"] == [32]
    go(tmp_path, make_stack(k=(2, 4), log_every=6), wandb=writer)
    assert [step for step, _ in wandb.logged] == [6, 6, STEPS, STEPS] and wandb.finished == 2
    assert "k2/loss" in wandb.logged[0][1] and "k4/loss" in wandb.logged[1][1]


def test_each_expansion_is_a_run_of_wandb(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    unit = tmp_path / "train" / "topk"
    unit.mkdir(parents=True)
    (unit / "started.json").write_text("{}")
    for expanded in config(wandb="saes", expansions=(2, 4)).each_expansion():
        Wandb(expanded, unit, "topk")
    first, second = wandb.runs
    assert first["id"] != second["id"] and first["dir"] == second["dir"] == str(tmp_path)


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--train.wandb takes the package wandb, .* pip install 'saejax\[wandb\]'"):
        Wandb(config(wandb="project"), tmp_path, "topk")

"""Runs of wandb hold what metrics.jsonl holds."""

import sys
import types

import pytest
from small_runs import STEPS, go, make_stack

from saejax.errors import UserError
from saejax.settings import TrainConfig
from saejax.training.metrics import Wandb


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


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_takes_every_record(tmp_path, wandb):
    unit = tmp_path / "train" / "topk"
    unit.mkdir(parents=True)
    (unit / "started.json").write_text("{}")
    config = TrainConfig(wandb="people/saes", expansions=(2, 4))
    narrow, wide = config.each_expansion()
    for each in (narrow, narrow, wide):
        with Wandb(each, unit, "topk") as writer:
            pass
    first, again, second = wandb.runs
    assert (first["entity"], first["project"], first["name"]) == ("people", "saes", "topk")
    assert first["id"] == again["id"] != second["id"] and first["resume"] == "allow" and first["config"]["k"] == [32]
    assert first["dir"] == second["dir"] == str(tmp_path)
    go(tmp_path, make_stack(k=(2, 4), log_every=6), wandb=writer)
    assert [step for step, _ in wandb.logged] == [6, 6, STEPS, STEPS] and wandb.finished == 3
    assert "k2/loss" in wandb.logged[0][1] and "k4/loss" in wandb.logged[1][1]


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--train.wandb takes the package wandb, .* pip install 'saejax\[wandb\]'"):
        Wandb(TrainConfig(wandb="project"), tmp_path, "topk")

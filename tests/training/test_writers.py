"""TensorBoard event files and wandb runs hold what metrics.jsonl holds."""

import json
import struct
import sys
import types

import pytest
from small_runs import STEPS, go, make_stack

from saejax.errors import UserError
from saejax.settings import TrainConfig
from saejax.training.metrics import make_writers


def events(folder) -> dict[tuple[str, int], float]:
    """The scalars of event files, as TensorBoard reads them: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            if event.HasField("session_log"):  # a purge: what came before is not shown from this step on
                found = {key: value for key, value in found.items() if key[1] < event.step}
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def config(**changes) -> TrainConfig:
    return TrainConfig(**changes)


def test_event_files_have_every_record_of_every_member(tmp_path):
    pytest.importorskip("tensorboardX")
    writers = make_writers(config(tensorboard=True), tmp_path, "topk", 0)
    go(tmp_path, make_stack(k=(2, 4), log_every=4), writers=writers)
    writers[0].close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 4, 8, 8, 12, 12]
    for member in ("k2", "k4"):
        found = events(tmp_path / "tensorboard" / member)
        own = [record for record in records if record["member"] == member]
        names = set(own[0]) - {"step", "tokens", "seconds", "tokens_per_second", "tflop_per_second", "mfu", "member"}
        assert set(found) == {(name, record["step"]) for record in own for name in names} and len(names) > 5
        for record in own:
            assert found["loss", record["step"]] == pytest.approx(record["loss"], rel=1e-6)


def test_a_run_that_goes_on_hides_what_the_killed_one_wrote_after_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX")
    for first, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 2.5})):
        (writer,) = make_writers(config(tensorboard=True), tmp_path, "topk", first)
        for step, value in values.items():
            writer.write(step, "", dict(loss=value))
        writer.close()
    assert events(tmp_path / "tensorboard") == {("loss", 1): 1.0, ("loss", 2): 2.5}


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
        (writer,) = make_writers(config(wandb="people/saes"), tmp_path, "topk", 0)
        writer.close()
    (first, again) = wandb.runs
    assert (first["entity"], first["project"], first["name"]) == ("people", "saes", "topk")
    assert first["id"] == again["id"] and first["resume"] == "allow" and first["config"]["k"] == [32]
    go(tmp_path, make_stack(k=(2, 4), log_every=6), writers=[writer])
    assert [step for step, _ in wandb.logged] == [6, 6, STEPS, STEPS] and wandb.finished == 2
    assert "k2/loss" in wandb.logged[0][1] and "k4/loss" in wandb.logged[1][1]


def test_each_expansion_is_a_run_of_wandb(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    unit = tmp_path / "train" / "topk"
    unit.mkdir(parents=True)
    (unit / "started.json").write_text("{}")
    for expanded in config(wandb="saes", expansions=(2, 4)).each_expansion():
        make_writers(expanded, unit, "topk", 0)
    first, second = wandb.runs
    assert first["id"] != second["id"] and first["dir"] == second["dir"] == str(tmp_path)


@pytest.mark.parametrize(("flag", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    value = True if flag == "tensorboard" else "project"
    with pytest.raises(
        UserError, match=rf"--train.{flag} takes the package {package}, .* pip install 'saejax\[{flag}\]'"
    ):
        make_writers(config(**{flag: value}), tmp_path, "topk", 0)
    assert make_writers(config(), tmp_path, "topk", 0) == []

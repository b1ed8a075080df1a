"""Processes agree on where they stop, and a run under a cluster's launcher hears of SIGTERM like any other."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import runs
from test_processes import WIDE

sys.path.insert(0, str(Path(__file__).parent.parent / "interpret"))
import protocol

import saejax.parallel.processes
from saejax.errors import Interrupted, OtherFailed, UserError
from saejax.parallel.cluster import check_same
from saejax.parallel.processes import Processes
from saejax.parallel.settings import MeshConfig
from saejax.parallel.stopping import StopAgreement
from saejax.runner import command, command_line
from saejax.runner.pipeline import RunOptions, _settings_to_compare, run_stages
from saejax.runner.plan import inputs_to_compare
from saejax.runner.registry import all_stages
from saejax.runner.workplan import Workplan
from saejax.stages.capture import run as capture
from saejax.stages.capture.run import _share_shards


class Store:
    """The keys and values of a coordination service, in memory."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in dict(self.values).items() if key.startswith(folder)]


@pytest.mark.parametrize("told", [0, 2])
def test_processes_stop_at_the_same_question(told):
    """Three that may be a question apart, as where each waits for the results of the step before."""
    count, store, rng = 3, Store(), random.Random(told)
    steps = [threading.Barrier(count) for _ in range(200)]
    stopped, is_told = {}, threading.Event()

    def work(rank):
        processes = Processes(store, rank, count)
        processes.stopping = is_told.is_set if rank == told else lambda: False
        agreement = StopAgreement(processes)
        for number, together in enumerate(steps):
            if agreement.ask():
                stopped[rank] = number
                break
            if number == 5 and rank == told:
                is_told.set()
            time.sleep(rng.random() * 0.02)
            together.wait(timeout=20)
        agreement.end()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(stopped) == count and len({*stopped.values()}) == 1 and 5 < min(stopped.values()) < 150


def test_one_that_failed_is_not_waited_for():
    store = Store()
    first, second = (Processes(store, rank, 2) for rank in range(2))
    first.stopping = lambda: True
    agreement = StopAgreement(first)
    second.tell_failure(1)
    assert not agreement.ask()
    agreement.end()
    assert not agreement.ask()


WAITS = {
    "a barrier": lambda processes: processes.barrier("place"),
    "a broadcast": lambda processes: processes.broadcast("place", ""),
    "files": lambda processes: processes.wait_until_visible([Path("/nowhere/at/all")]),
    "shards": lambda processes: _share_shards(*of_two_shards(processes)),
}


def of_two_shards(processes):
    """A capture whose second shard, that of another process, never comes."""
    plan = types.SimpleNamespace(size=lambda shard: 10)
    writer = types.SimpleNamespace(folder=Path("/nowhere"))
    mesh = MeshConfig(processes=2, process_id=processes.rank)
    return plan, writer, mesh, {0: ("resid_post.1",), 1: ("resid_post.1",)}, lambda share: 1.0


@pytest.mark.parametrize("what", WAITS)
@pytest.mark.parametrize("ended_by", ["a failure", "a signal"])
def test_whoever_waits_hears_of_failures_and_signals(monkeypatch, what, ended_by):
    store, is_told = Store(), threading.Event()
    first, second = (Processes(store, rank, 2) for rank in range(2))
    second.stopping = is_told.is_set
    monkeypatch.setattr(capture, "joined_processes", lambda: second)
    monkeypatch.setattr(capture, "wait_for_all", lambda place: None)
    timer = threading.Timer(0.3, is_told.set if ended_by == "a signal" else lambda: first.put("failed", "7"))
    start = time.monotonic()
    timer.start()
    with pytest.raises(Interrupted if ended_by == "a signal" else OtherFailed) as error:
        WAITS[what](second)
    assert 0.2 < time.monotonic() - start < 60
    assert ended_by == "a signal" or error.value.status == 7


def test_whoever_works_hears_of_failures_and_signals(monkeypatch):
    monkeypatch.setattr(saejax.parallel.processes, "_LOOK_WORKING", 0.0)
    store, is_told = Store(), threading.Event()
    first, second = (Processes(store, rank, 2) for rank in range(2))
    second.stopping = is_told.is_set
    assert not second.should_stop()
    is_told.set()
    assert second.should_stop()
    first.put("failed", "7")
    with pytest.raises(OtherFailed) as error:
        second.should_stop()
    assert error.value.status == 7
    store.key_value_dir_get = None  # gone with process 0
    assert second.should_stop()


def test_hosts_with_other_files_of_a_model_are_refused(inputs, tmp_path):
    """A branch of the hub may be another revision on another host; nothing has run when that is found."""
    model, store = shutil.copytree(inputs[0], tmp_path / "model"), Store()
    configs = runs.make_configs(model__path=str(model), corpus__path=str(inputs[1]))

    def compare(rank):
        check_same(Processes(store, rank, 2), inputs_to_compare(Workplan(configs), ["capture"]))

    compare(0)
    compare(1)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="the model that capture reads is [0-9a-f]+ in process 1 and [0-9a-f]+ in"):
        compare(1)


def test_a_process_with_other_flags_is_refused():
    store = Store()

    def compare(rank, **changes):
        check_same(Processes(store, rank, 2), _settings_to_compare(runs.make_configs(**changes), ["capture"]))

    compare(0)
    compare(1)
    with pytest.raises(UserError, match='--capture.bos is "never" in process 1 and "auto" in process 0: start all'):
        compare(1, capture__bos="never")


@pytest.fixture(scope="module")
def captured(inputs, single_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopping") / "run"
    assert command.run(["capture"], "", ["program", *runs.small_flags(*inputs, workdir)]) == 0
    return workdir


ENDLESS = dict(train__epochs=4000, train__checkpoint_every=100000, train__kinds="topk")


DEAF = {
    "in Python": "while True: time.sleep(0.01)",
    "outside of Python": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "in a thread that is waited for": "futures.ThreadPoolExecutor(1).submit(time.sleep, 600).result()",
}


# One process imports what all of them run.
DEAF_PROGRAM = f"""
import hashlib, os, sys, time
from concurrent import futures
from saejax.runner import command, pipeline

def run_stages(*args):
    print("deaf:", os.getpid(), flush=True)
    exec(code)

for code in {list(DEAF.values())}:
    if child := os.fork():
        print("ended:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        pipeline.run_stages, command._PATIENCE = run_stages, 0.5
        command.leave(command.run(["report"], "", sys.argv))
"""


def test_who_does_not_ask_is_interrupted(tmp_path):
    """Such as a stage that downloads, compiles or writes; a process of a run ends with the same status."""
    process = runs.start(DEAF_PROGRAM, [f"--workdir={tmp_path}"])
    for where in DEAF:
        deaf = next(line for line in process.stdout if line.startswith("deaf:"))
        start = time.monotonic()
        os.kill(int(deaf.split()[1]), signal.SIGTERM)
        output = [next(process.stdout)]
        while not output[-1].startswith("ended:"):
            output.append(next(process.stdout))
        said = "stopped; finished units are kept: run the same command to go on\n"
        assert output[-2:] == [said, "ended: 143\n"], (where, output)
        assert time.monotonic() - start < 60
    assert runs.finish(process) == ""


# What reads for long is found by its name, and made to read for ever.
READING = """
import importlib, itertools, sys, time
from saejax.runner import command

def read_for_ever(*args, **kwargs):
    print("reading", flush=True)
    for _ in itertools.repeat(None):
        time.sleep(0.01)

owner, _, name = sys.argv.pop().rpartition(".")
module, _, attribute = owner.partition(":")
target = importlib.import_module(module)
setattr(getattr(target, attribute) if attribute else target, name, read_for_ever)
command._PATIENCE = 600
command.leave(command.run(["capture"], "", sys.argv))
"""


@pytest.mark.parametrize(
    "what",
    [
        "saejax.models.weights.read_parts",
        "saejax.models.identity.file_sha256",
        "saejax.activations.writer:StoreWriter.has",
    ],
)
def test_what_reads_for_long_is_interrupted_at_once(inputs, tmp_path, what):
    """Nobody asks there whether to stop, and nothing is to be saved."""
    process = runs.start(READING, [*runs.small_flags(*inputs, tmp_path / "run"), what])
    before = list(itertools.takewhile(lambda line: line != "reading\n", process.stdout))
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert runs.finish(process, 143).endswith("run the same command to go on\n"), before
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("launcher", ["auto", pytest.param("flags", marks=pytest.mark.slow)])
def test_a_process_that_waits_for_others_to_start_hears_of_the_signal(inputs, tmp_path, launcher):
    step = runs.slurm_step()
    flags = [*runs.small_flags(*inputs, tmp_path / "run"), f"--mesh.coordinator={step['coordinator']}"]
    environment = {}
    if launcher == "auto":
        flags += ["--mesh.distributed=auto"]
        environment = step["environment"] | dict(SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2")
    else:
        flags += ["--mesh.processes=2", "--mesh.process_id=0"]
    process = runs.start("baseline", flags, **environment)
    port = int(step["coordinator"].partition(":")[2])
    while socket.socket().connect_ex(("localhost", port)):  # it listens for the others
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert "stopped while waiting for other processes to start" in runs.finish(process, 143)
    assert time.monotonic() - start < 60


@pytest.mark.slow  # processes that stop together, and one of a whole run that is told, are tested above and elsewhere
def test_a_signal_to_one_of_two_processes_that_train_together_stops_both(inputs, captured, tmp_path):
    workdir = tmp_path / "run"
    runs.copy_units(captured, workdir, "capture")
    pair = runs.start_pair("train", runs.small_flags(*inputs, workdir, **ENDLESS))
    list(itertools.takewhile(lambda line: "tokens/s" not in line, pair[0].stdout))
    os.kill(pair[1].pid, signal.SIGTERM)
    for output in [runs.finish(process, 143) for process in pair]:
        assert "Traceback" not in output
    assert list((workdir / "train").glob("topk-*/checkpoints/*")), "they have saved together"


@pytest.mark.slow  # what waits for shards is told of a signal above, and two processes that train are asked to stop
def test_a_signal_to_one_of_two_processes_that_capture_stops_both(inputs, tmp_path):
    """Each makes shards of its own, one document at a time; the other one hears of it in its loop or as it waits."""
    slow = dict(capture__batch_tokens=1, capture__shard_rows=500)
    pair = runs.start_pair("capture", runs.small_flags(*inputs, tmp_path / "run", **slow))
    list(itertools.takewhile(lambda line: "shards are done" not in line, pair[0].stdout))
    os.kill(pair[1].pid, signal.SIGTERM)
    for output in [runs.finish(process, 143) for process in pair]:
        assert "Traceback" not in output
    # And together they go on.
    for process in runs.start_pair("capture", runs.small_flags(*inputs, tmp_path / "run")):
        runs.finish(process)


#: stages that two processes share, and a line that comes before the last of several parts of their work
SHARED = {
    "evaluate": "started",
    "interpret": "have a label",
    "ablate": "(1 of 4)",
    "attribute": "(1 of 4)",
}


@pytest.fixture(scope="module")
def trained(inputs, single_device, tmp_path_factory):
    """A run with twelve dictionaries, beside it transcoders of all layers; the flags that go on with both."""
    folder = tmp_path_factory.mktemp("shared")
    flags = dict(train__k=",".join(map(str, range(1, 13))), train__kinds="topk", train__epochs=1)
    flags |= dict(interpret__dictionaries="topk", ablate__dictionary="topk/k8", ablate__untrained_dictionaries=0)
    arguments = runs.small_flags(*inputs, folder / "run", **flags)
    assert command.run(["baseline", "capture", "train"], "", ["program", *arguments]) == 0
    transcoders = dict(train__source="model", train__form="transcoder", train__sites="mlp_in.0-1", train__kinds="topk")
    transcoders |= dict(train__buffer_rows=256, train__epochs=1)
    assert command.run(["train"], "", ["program", *runs.small_flags(*inputs, folder / "sets", **transcoders)]) == 0
    flags |= dict(
        graph__transcoders=folder / "sets" / "train" / "topk",
        graph__behaviours="agreement,capital,greater_than,addition",
    )
    return folder / "run", flags


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", SHARED)
def test_a_signal_to_one_of_two_processes_that_share_a_stage_stops_both(inputs, trained, tmp_path, stage):
    """While each has parts of the work left, of its own or together with the other one."""
    runs.copy_run(trained[0], tmp_path / "run")
    pair = runs.start_pair(stage, runs.small_flags(*inputs, tmp_path / "run", **trained[1]))
    before = list(itertools.takewhile(lambda line: SHARED[stage] not in line, pair[0].stdout))
    os.kill(pair[1].pid, signal.SIGTERM)
    for output in [runs.finish(process, 143) for process in pair]:
        assert "Traceback" not in output, [*before, output]
    assert not list((tmp_path / "run" / stage).rglob("done.json"))


#: stages whose units take moments and write one file from what others measured.
MOMENTS = {"report"}
#: stages that run by themselves, and their settings.
ALONE = dict(
    tokenize=dict(corpus__stream=True),
    algorithm=dict(algorithm__names=("addition",), algorithm__steps=20),
    known_circuits=dict(known__circuits=("logic",), known__prompts=10, known__graphs=1),
    ground_truth=dict(
        truth__features=32, truth__dimensions=16, truth__samples=640, truth__held_out=100, truth__roots=0
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_stage_asks_whether_to_stop_and_goes_on(inputs, trained, tmp_path):
    rows = [dict(question=f"What is {n} plus {n}?", answer=f"{n} + {n} = {2 * n}\n#### {2 * n}") for n in range(12)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stopped, deaf = set(), set()

    def ask_and_go_on(stage, configs, workdir):
        for unit in stage.units(configs):
            answers, options = itertools.chain([False], itertools.repeat(True)), RunOptions(only=unit)
            try:  # the first question is asked before the unit is begun
                run_stages([stage.name], configs, workdir, stopping=answers.__next__, options=options)
                deaf.add(stage.name)
            except Interrupted:
                stopped.add(stage.name)
            run_stages([stage.name], configs, workdir, options=options)

    with protocol.Server(lambda prompt: "yes") as server:
        more = dict(
            task__path=tmp_path / "gsm8k.jsonl", study__falsify=4, export__dictionaries="topk",
            explain__dictionaries="topk", explain__url=server.url, explain__model="judge", explain__sample=2,
            track__prompt="The river follows the teacher. The garden finds the engine.", track__dictionaries="topk",
            graph__transcoders=trained[1]["graph__transcoders"], graph__behaviours="agreement",
            circuits__behaviours="agreement", circuits__traced=2,
        )  # fmt: skip
        arguments = ["program", *runs.small_flags(*inputs, tmp_path / "run", **WIDE | more)]
        configs = command_line.read_configs(command_line.stage_flags(), arguments)
        for stage in all_stages().values():
            ask_and_go_on(stage, configs, tmp_path / "run")
    for name, changes in ALONE.items():
        alone = configs
        for setting, value in changes.items():
            group, field = setting.split("__")
            alone |= dataclasses.replace(alone.named(group), **{field: value})
        ask_and_go_on(all_stages()[name], alone, tmp_path / name)
    assert deaf <= MOMENTS and stopped >= set(all_stages()) - MOMENTS

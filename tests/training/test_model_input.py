"""Training straight from the model: nothing on disk, and resumed with the same bits in whatever buffer it was."""

import functools
import itertools
import math
import re
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file
from small_runs import assert_same_bits, go, make_stack, records
from small_stacks import B, D

from saejax import load_dictionary
from saejax.activations import stream
from saejax.activations.results import CaptureResults, TokenizeResults
from saejax.activations.stream import BufferOrder
from saejax.errors import Interrupted
from saejax.parallel import collectives
from saejax.preflight.results import PreflightResults
from saejax.runner import command
from saejax.runner.registry import default_configs
from saejax.runner.results import load_results
from saejax.runner.workplan import Workplan
from saejax.training import inputs as train_inputs
from saejax.training.inputs import ModelBatches

pytestmark = pytest.mark.usefixtures("two_devices")
CHANGES = dict(train__source="model", train__buffer_rows=200, train__epochs=2, train__kinds="batchtopk")


@pytest.fixture(scope="module")
def train(inputs, tmp_path_factory):
    """Trains in a new folder or in one given; gives the exit status and the folder."""

    def run(workdir=None, **changes):
        workdir = workdir or tmp_path_factory.mktemp("model") / "run"
        flags = runs.small_flags(*inputs, workdir, **CHANGES | changes)
        return command.run(["train"], "", ["program", *flags]), workdir

    return run


def test_several_processes_agree_on_the_batch_of_a_buffer_at_which_they_stop(monkeypatch):
    """A buffer may take longer than a signal waits to be asked for: what was trained since a checkpoint was lost."""

    class Made(Exception):
        pass

    def make(*arguments):
        raise Made(arguments[-1])

    configs = default_configs()  # before the patches: it imports the stages, which would keep them
    monkeypatch.setattr(train_inputs, "ModelStream", make)
    for module in (train_inputs, collectives):
        monkeypatch.setattr(module, "process_count", lambda: 2)
    with pytest.raises(Made) as made:
        train_inputs.model_source(configs, [["resid_post.0"]], None, print, lambda: True)
    (stopping,) = made.value.args
    answers = iter([False, True])  # this process was told to stop, and the others have come further
    monkeypatch.setattr(collectives, "stop_agreement", lambda: SimpleNamespace(ask=answers.__next__))
    assert [stopping(), stopping()] == [False, True]


@pytest.mark.parametrize("moments", [(7,), pytest.param((1, 7), marks=pytest.mark.slow)])
def test_stopped_at_any_buffer_it_ends_with_the_same_bits(train, monkeypatch, capsys, moments):
    monkeypatch.setattr(stream, "SAY_EVERY", 0.0)
    midway = dict(train__score_every=10, train__ce_every=3, train__save_every=10)  # which change no bits
    status, whole = train(**midway)
    assert status == 0 and not (whole / "capture").exists()
    output = capsys.readouterr().out
    assert "buffer 1 of " in output and "buffer 3 of " in output and output.count("on held-out tokens L0") == 3
    assert output.count("cross-entropy recovered") == 1
    monkeypatch.setattr(stream, "SAY_EVERY", math.inf)  # the first is said at once
    for moment in moments:  # in the first buffer, in a later one
        line = "before the first step" if moment == 1 else "of 30; saved"
        stopping = map(moment.__le__, itertools.count())
        monkeypatch.setattr(command, "install_signal_handlers", lambda stopping=stopping: stopping.__next__)
        status, broken = train()
        output = capsys.readouterr()
        assert status == 143 and line in output.err and output.out.count("buffer ") == (moment > 1)
    monkeypatch.setattr(command, "install_signal_handlers", lambda: lambda: False)
    assert train(broken, **midway)[0] == 0
    assert runs.dictionary_checksums(broken) == runs.dictionary_checksums(whole) != {}
    scores = [
        [
            [record.get(f"held_out_{name}") for name in ("explained_variance", "l0", "dead", "ce_recovered")]
            for record in records(unit)
        ]
        for unit in (whole / "train/batchtopk", broken / "train/batchtopk")
    ]
    assert scores[0] == scores[1] and sum(score[0] is not None for score in scores[0]) == 3
    assert [score[3] is not None for score in scores[0]] == [False] * (len(scores[0]) - 1) + [True]
    assert '"l0"' in (found := (whole / "train/batchtopk/done.json").read_text()) and "held_out_" not in found
    for step in (10, 20, 30):
        saved = [load_dictionary(run / f"train/batchtopk/steps/{step}") for run in (whole, broken)]
        assert_same_bits(saved[0].arrays, saved[1].arrays)
    assert_same_bits(saved[0].arrays, load_dictionary(whole / "train/batchtopk").arrays)
    shutil.rmtree(whole / "train/batchtopk/steps")  # which is no file of the unit
    assert train(whole)[0] == 0


def test_what_it_depends_on(inputs):
    def mark(**changes):
        made = runs.make_configs(**dict(model__path=str(inputs[0]), train__source="model") | changes)
        return Workplan(made).fingerprint("train/topk")

    assert mark() == mark(capture__sites=("mlp_out.0",), capture__batch_tokens=9, task__seed=9, capture__tokens=9)
    changes = dict(corpus__held_out=0.3, corpus__stream=True, capture__dtype="bfloat16", train__buffer_rows=9)
    changes |= dict(train__sites=("mlp_out.0",))
    assert len({mark(), *(mark(**{key: value}) for key, value in changes.items())}) == 6
    store = dict(train__source="store")
    assert mark(**store) == mark(**store, capture__sites=("resid_post.15", "mlp_out.0")), "of a store its own sites"
    assert mark(**store) != mark(**store, capture__dtype="bfloat16")


def test_bad_input_is_one_line(train, capsys):
    for changes, message in [
        (dict(train__buffer_rows=10), "--train.buffer_rows=10 is less than one batch of 64"),
        (dict(train__sites="all"), "--train.sites=all with --train.source=model: name the sites"),
        (dict(train__sites="resid_post.9"), "resid_post.9"),
    ]:
        capsys.readouterr()
        assert train(**changes)[0] == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert message in error


def test_it_is_evaluated_and_reported_with_a_sample_in_place_of_a_store(inputs, tmp_path, capsys):
    changes = dict(corpus__stream=True, capture__tokens=150, train__kinds="topk")
    changes |= dict(task__behaviours="", evaluate__ce_documents=2, train__kl_steps=2)  # and it is fine-tuned
    flags = runs.small_flags(*inputs, tmp_path / "run", **CHANGES | changes)
    stages = ["preflight", "baseline", "tokenize", "capture", "train", "evaluate", "report"]
    assert command.run(stages, "", ["program", *flags]) == 0, capsys.readouterr().err
    assert "fine-tuning: step 2 of 2" in capsys.readouterr().out
    text: TokenizeResults = load_results(tmp_path / "run" / "tokenize")
    store: CaptureResults = load_results(tmp_path / "run" / "capture")
    assert all(150 <= store.tokens[split] < 170 < text.tokens[split] for split in ("train", "held_out"))
    preflight: PreflightResults = load_results(tmp_path / "run" / "preflight")
    assert preflight.seconds and preflight.seconds["capture"] < preflight.seconds["train"] / 4
    (scores,) = load_results(tmp_path / "run" / "evaluate" / "topk").members
    assert scores.tokens <= store.tokens["held_out"]
    assert (tmp_path / "run" / "report" / "index.html").exists()


class Buffers:
    """A stream of three buffers of known values; every tenth row of the second is a sink."""

    dtype = np.dtype(np.float32)
    on_devices = None  # on the host
    sizes = (2 * B + 6, 2 * B + 6, B + 5)

    def __init__(self, first=0):
        rng = np.random.default_rng(0)
        self.values = [rng.normal(size=(size, D)).astype(np.float32) for size in self.sizes]
        self.filled = [first]

    def __len__(self):
        return len(self.sizes)

    def size(self, buffer):
        return self.sizes[buffer]

    def d(self, site):
        return D

    def fill(self, buffer):
        self.filled.append(buffer)
        return True

    def rows(self, split, *sites):
        rows = np.arange(self.sizes[self.filled[-1]])
        return rows[rows % 10 > 0] if self.filled[-1] == 1 else rows

    def read(self, site, rows):
        return self.values[self.filled[-1]][rows]


def test_each_step_takes_its_rows_of_its_buffer(tmp_path):
    stack, stream = make_stack(), Buffers()
    order = BufferOrder(stream.sizes, B, stack.config.seed[0])

    class Expected:
        def batch(self, step):
            epoch, buffer, begin, _ = order.locate(step)
            at_hand = Buffers(buffer)
            rows = at_hand.rows("train")
            places = order.places(epoch, buffer, len(rows))[step - begin]
            return (jax.device_put(at_hand.read("", rows[places])[None], stack.batch_sharding),)

    expected = go(tmp_path / "expected", stack, lambda *args: Expected())
    sources = []

    def from_model(stack, store):
        sources.append(ModelBatches(stack, Buffers()))
        return sources[-1]

    with pytest.raises(Interrupted, match="at step 1 of"):
        go(tmp_path / "model", stack, from_model, stop_after=1)  # within the first buffer
    found = go(tmp_path / "model", stack, from_model)
    assert_same_bits(found, expected)
    assert sources[1]._stream.filled[:3] == [0, 1, 2], "the first is not made twice"


@pytest.mark.slow
def test_two_processes_train_from_the_model_as_one(inputs, tmp_path):
    sites = "resid_post.0,resid_post.1"
    changes = dict(train__source="model", train__kinds="topk", train__buffer_rows=400)
    changes |= dict(train__sites=sites, capture__sites=sites, train__epochs=20, train__max_steps=40)
    changes |= dict(mesh__member=2, mesh__model=2)
    one = runs.start("train", runs.small_flags(*inputs, tmp_path / "one", **changes), JAX_NUM_CPU_DEVICES="8")
    flags = runs.small_flags(*inputs, tmp_path / "two", **changes)
    for process in (one, *runs.start_pair("train", flags, JAX_NUM_CPU_DEVICES="4")):
        runs.finish(process)
    assert runs.dictionary_checksums(tmp_path / "one") == runs.dictionary_checksums(tmp_path / "two")
    assert len(runs.dictionary_checksums(tmp_path / "two")) == 2
    refused = runs.start_pair("train", [*flags, "--model.backend=torch"], JAX_NUM_CPU_DEVICES="4")
    outputs = [process.communicate()[0] for process in refused]
    assert [process.returncode for process in refused] == [2, 2] and "with --model.backend=jax" in outputs[0]


# Each batch of a buffer takes a while, as those of a large model do.
SLOWLY = """
import time
from saejax.activations.stream import ModelStream
from saejax.cli import main

def batches(stream, plan, buffer, made=ModelStream._batches):
    left = len([*plan.batches(buffer)])
    for batch in made(stream, plan, buffer):
        left -= 1
        print(f"buffer {buffer}: {left} batches are left", flush=True)
        time.sleep(0.2)
        yield batch

ModelStream._batches = batches
main("train")
"""


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    """Makes flags of two processes that train from the model in two buffers of many batches; a run's checksums."""
    folder = tmp_path_factory.mktemp("unbroken")
    changes = dict(train__source="model", train__kinds="topk", train__buffer_rows=1600, train__epochs=1)
    changes |= dict(capture__batch_tokens=1, train__checkpoint_every=100_000, mesh__model=2)
    corpus = runs.save_corpus(folder / "corpus.jsonl.gz", 120)
    flags = functools.partial(runs.small_flags, inputs[0], corpus, **changes)
    for process in runs.start_pair("train", flags(folder / "run"), JAX_NUM_CPU_DEVICES="2"):
        runs.finish(process)
    return flags, runs.dictionary_checksums(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("buffer", [0, 1])
def test_two_processes_told_to_stop_within_a_buffer_save_and_go_on_to_the_same_bits(unbroken, tmp_path, told, buffer):
    make_flags, checksums = unbroken
    flags = make_flags(tmp_path / "run")
    pair = runs.start_pair(SLOWLY, flags, JAX_NUM_CPU_DEVICES="2")
    first = next(line for line in pair[0].stdout if f"buffer {buffer}: " in line)
    assert int(re.search(r"(\d+) batches are left", first)[1]) > 5
    start = time.monotonic()
    for number in told:
        pair[number].send_signal(signal.SIGTERM)
    for output in [runs.finish(process, 143) for process in pair]:
        said = "saved: run the same command to go on"
        if buffer == 0:  # nothing is saved yet, so one may end before the other has asked once more
            said = r"stopped before the first step|process \d was stopped, so this one ends"
        assert re.search(said, output) and f"buffer {buffer}: 0 " not in output and "Traceback" not in output, output
    assert time.monotonic() - start < 60
    again = [runs.finish(each) for each in runs.start_pair("train", flags, JAX_NUM_CPU_DEVICES="2")]
    assert buffer == 0 or "resuming topk at step" in again[0]
    assert runs.dictionary_checksums(tmp_path / "run") == checksums


CROSS_LAYER = dict(
    train__source="model", train__form="cross_layer_transcoder", train__sites="mlp_in.0-1",
    train__kinds="batchtopk", train__buffer_rows=200, train__epochs=3, train__checkpoint_every=2,
    train__state_dtype="float64",
)  # fmt: skip
SET = ("train", "batchtopk")
X64 = dict(JAX_ENABLE_X64="1")


def written(folder):
    """The bytes of the set's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.joinpath(*SET).glob("W_*.safetensors"))}


@pytest.mark.slow  # seven processes
def test_two_processes_train_a_cross_layer_transcoder_as_one_and_killed_they_end_with_the_same_bytes(inputs, tmp_path):
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    shared = dict(CROSS_LAYER, mesh__model=2)
    runs.finish(runs.start("train", runs.small_flags(*inputs, one, **CROSS_LAYER), **X64))
    for process in runs.start_pair("train", runs.small_flags(*inputs, two, **shared), **X64):
        runs.finish(process)
    pair = runs.start_pair("train", runs.small_flags(*inputs, killed, **shared), **X64)
    checkpoints = killed.joinpath(*SET, "checkpoints")
    while not any(path.name.isdigit() for path in checkpoints.glob("*")):
        assert all(process.poll() is None for process in pair), pair[0].communicate()[0]
        time.sleep(0.01)
    for process in pair:
        process.kill()
    for process in pair:
        process.communicate()
    assert not written(killed)
    again = [runs.finish(each) for each in runs.start_pair("train", runs.small_flags(*inputs, killed, **shared), **X64)]
    assert any("resuming batchtopk at step" in line for line in again)
    assert written(killed) == written(two) and len(written(two)) == 4
    for name in written(one):
        first, second = (load_file(folder.joinpath(*SET, name)) for folder in (one, two))
        assert first.keys() == second.keys()
        for array in first:
            off = np.linalg.norm(second[array] - first[array])  # what the model gives is fp32
            assert off <= 1e-5 * np.linalg.norm(first[array]), f"{name} {array}"

"""Real processes: killed and resumed, asked to stop, and two that train and ablate together."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import random
import re
import signal
import time

import jax
import numpy as np
import pytest
import runs
import settings_read
from compared import assert_as_one, kill_at_random_moments
from every_kind import KINDS, PLUGIN

from saejax.dictionaries import load_dictionary
from saejax.interventions.importance import Importance
from saejax.interventions.table import load_effects
from saejax.runner import command
from saejax.runner.registry import all_stages

# As many behaviours and dictionaries as processes: more of either add time alone, as simpler bases do. The prompts of
# these behaviours are of the same lengths, and what runs on one runs on the other.
TWO = dict(task__behaviours="agreement,greater_than", ablate__baselines="", train__kinds="topk", train__k="4,8")
TWO |= dict(ablate__dictionary="topk/k8", ablate__untrained_dictionaries=0, ablate__top=1, ablate__text_documents=0)
TWO |= dict(causal__random_sets=2, causal__placebo_targets=2)
TWO |= dict(train__checkpoint_every=5, train__max_steps=20, train__auxk=0.03)

# Preflight and the report take half of the time, and nothing of them is compared.
MEASURED = [stage for stage in all_stages() if stage not in ("preflight", "report")]
MEASURE = f"""
import sys
from saejax.runner import command
command.leave(command.run({MEASURED}, "", sys.argv))
"""


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory, single_device):
    """An uninterrupted run, in this process: its workdir, how many lines it printed, and settings left unread."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    settings_read.READ.clear()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert command.run(MEASURED, "", ["program", *runs.small_flags(*inputs, workdir, **TWO)]) == 0
    unread = {unit: settings_read.DECLARED[unit] - read for unit, read in settings_read.READ.items()}
    return workdir, output.getvalue().count("\n"), unread


def test_what_is_declared_is_read(whole):
    """Otherwise a changed setting would make again what is the same: a hash covers what the code reads, no more."""
    stages = ("baseline", "capture", "train", "evaluate", "ablate")
    unread = {unit: left for unit, left in whole[2].items() if unit.startswith(stages)}
    assert {unit.partition("/")[0] for unit in unread} == {*stages}
    # The code reads it only where something else is true, which other settings do not say.
    assert set().union(*unread.values()) <= {"evaluate.ce_documents"}, unread


# Statement 1 of WORKSPACE.md, what must hold.
@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_with_the_same_bits(inputs, whole, tmp_path, capsys):
    workdir, lines, _ = whole
    sources = itertools.cycle(["resident", "streamed"])  # a run may go on with the other

    def start(folder):
        flags = runs.small_flags(*inputs, folder, train__input=next(sources), **TWO)
        return [runs.start(MEASURE, flags)]

    def check(folder):
        assert runs.checksums(folder) == runs.checksums(workdir)

    folder = kill_at_random_moments(start, check, tmp_path, 10, lines)
    capsys.readouterr()
    assert command.run(MEASURED, "", ["program", *runs.small_flags(*inputs, folder, **TWO)]) == 0
    again = capsys.readouterr().out
    assert again.count("done before, unchanged") == 5 and "started" not in again


KILLED = """
import os
import signal
from saejax.cli import main
from saejax.training.checkpoints import Checkpoints

def save_and_die(checkpoints, step, state, save=Checkpoints.save):
    save(checkpoints, step, state)
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
main("train")
"""


# Statement 1 of WORKSPACE.md, what must hold.
def test_killed_while_a_checkpoint_is_written_it_ends_with_the_same_bits(inputs, whole, tmp_path, capsys):
    """Training goes on from the other source of batches. Whole runs are killed above, by the slow test."""
    folder = tmp_path / "run"
    runs.captured_only(whole[0], folder)
    first, second = (runs.small_flags(*inputs, folder, train__input=s, **TWO) for s in ("resident", "streamed"))
    runs.finish(runs.start(KILLED, first), -signal.SIGKILL)
    assert command.run(["train"], "", ["program", *second]) == 0
    assert int(re.search(r"resuming topk at step (\d+)", capsys.readouterr().out)[1]) in (5, 10)
    assert runs.checksums(folder) == runs.checksums(whole[0])


@pytest.fixture
def hears_hangups():
    """Let processes that a test starts hear SIGHUP, which they would ignore where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hears_hangups")
# One handler has all signals; tests/test_bad_input.py closes a real terminal.
@pytest.mark.parametrize(
    "before", [(), *(pytest.param((some,), marks=pytest.mark.slow) for some in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_signal_saves_and_exits_cleanly(inputs, whole, tmp_path, before):
    """In a job step of one node, where JAX's own handler of SIGTERM must not take the place of Python's."""
    workdir, step = tmp_path / "run", runs.slurm_step()
    runs.captured_only(whole[0], workdir)
    flags = runs.small_flags(*inputs, workdir, train__epochs=4000, train__checkpoint_every=100000, train__kinds="topk")
    launched = ["--mesh.distributed=auto", f"--mesh.coordinator={step['coordinator']}"]
    starts = [(some, [], {}) for some in before] + [(signal.SIGTERM, launched, step["environment"])]
    for number, more, environment in starts:
        process = runs.start("train", [*flags, *more], **environment)
        said = "".join(itertools.takewhile(lambda line: "tokens/s" not in line, process.stdout))
        process.send_signal(number)
        output = runs.finish(process, 128 + number)
        assert "run the same command to go on" in output and "Traceback" not in output
    assert not before or int(re.search(r"resuming topk at step (\d+)", said)[1]) > 0
    assert [*(workdir / "train" / "topk").rglob("checkpoints/[1-9]*")], "it was saved beyond step 0"


@pytest.mark.slow
@pytest.mark.timeout(2400)  # each start compiles the steps of the kinds that are left
@pytest.mark.parametrize(("source", "kills"), [("store", 14), ("model", 6)])
def test_killed_while_any_kind_trains_it_ends_with_the_same_bits(inputs, whole, tmp_path, source, kills):
    changes = dict(train__source=source, train__epochs=60, train__k="8,4", train__auxk=0.03, plugins=PLUGIN)
    changes |= dict(train__buffer_rows=200, train__checkpoint_every=20)
    modes = random.Random(kills)

    def start(folder):
        if not folder.exists():
            runs.captured_only(whole[0], folder)
        first = len([*tmp_path.iterdir()]) % len(KINDS)
        kinds = ",".join(KINDS[first:] + KINDS[:first])
        mode = dict(train__kinds=kinds, train__input=modes.choice(["resident", "streamed"]))
        return [runs.start("train", runs.small_flags(*inputs, folder, **changes | mode))]

    lines = runs.finish(*start(tmp_path / "whole")).count("\n")
    expected = runs.dictionary_checksums(tmp_path / "whole")
    assert len(expected) == len(KINDS) + 4  # four kinds have a k, and so two members each

    def check(folder):
        assert runs.dictionary_checksums(folder) == expected

    kill_at_random_moments(start, check, tmp_path, kills, lines)


# Statement 13 of WORKSPACE.md, what must hold.
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance", "mesh"),
    [
        ("topk", "float64", 1e-9, dict(mesh__model=2)),
        # Every device of both processes holds an eighth of the features.
        pytest.param("topk", "float64", 1e-9, dict(mesh__model=8), marks=pytest.mark.slow),
        # Each process holds one of two members, and needs all rows.
        pytest.param("topk", "float64", 1e-9, dict(mesh__member=2, train__seed="123,5"), marks=pytest.mark.slow),
        *(pytest.param(k, "float64", 1e-9, dict(mesh__model=2), marks=pytest.mark.slow) for k in KINDS if k != "topk"),
        *(pytest.param(kind, "float32", 1e-4, dict(mesh__model=2), marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_two_processes_train_as_one(inputs, whole, tmp_path, single_device, kind, dtype, tolerance, mesh):
    folders = [tmp_path / "alone", tmp_path / "together"]
    for folder in folders:
        runs.captured_only(whole[0], folder)
    changes = dict(train__max_steps=20, train__state_dtype=dtype, train__kinds=kind, plugins=PLUGIN)
    changes |= dict(train__score_every=10, train__save_every=10)
    x64 = dict(JAX_ENABLE_X64="1") if dtype == "float64" else {}
    stack = {name: value for name, value in mesh.items() if name.startswith("train")}
    flags = runs.small_flags(*inputs, folders[1], **changes | mesh)
    devices = "4" if mesh.get("mesh__model") == 8 else "2"  # of each process
    for process in runs.start_pair("train", flags, JAX_NUM_CPU_DEVICES=devices, **x64):
        runs.finish(process)
    jax.config.update("jax_enable_x64", dtype == "float64")  # not the context: Orbax reads in threads of its own
    try:
        flags = runs.small_flags(*inputs, folders[0], **changes | stack)
        assert command.run(["train"], "", ["program", *flags]) == 0
        member = "seed123" if stack else ""
        for place in (member, f"{member}/steps/10".lstrip("/")):
            first, second = (load_dictionary(folder / "train" / kind / place) for folder in folders)
            for name in first.arrays:
                a, b = (np.asarray(dictionary.arrays[name], np.float64) for dictionary in (first, second))
                assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a), name
        files = [folder / "train" / kind / member / "metrics.jsonl" for folder in folders]
        first, second = (json.loads(file.read_text().splitlines()[-1]) for file in files)
        # The smallest activation that training keeps stands at the threshold: rounding says whether it fires in
        # held-out text, once in the 192 tokens of a batch.
        firings = 192 * abs(first["held_out_l0"] - second["held_out_l0"])
        assert firings == pytest.approx(0, abs=1e-3) or (kind in ("batchtopk", "matryoshka") and firings < 1.001)
        near = 1e-5 if firings < 0.5 else 2e-3
        assert first["held_out_explained_variance"] == pytest.approx(second["held_out_explained_variance"], abs=near)
    finally:
        jax.config.update("jax_enable_x64", False)


def ablate_flags(inputs, folder, **changes):
    """Flags of a run with two behaviours, all of whose features are ablated, and top neurons."""
    changes |= dict(train__k=8, ablate__dictionary="topk", ablate__effects="all", ablate__baselines="neurons")
    return runs.small_flags(*inputs, folder, **TWO | changes)


def ablated(folder):
    """What the ablate stage wrote, by file, but for what says when and where."""
    files = [path for path in (folder / "ablate").rglob("*") if path.is_file()]
    return {path.name: path.read_bytes() for path in files if path.name not in ("started.json", "done.json")}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run that is ready to ablate."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    for stage in ("baseline", "capture", "train"):
        runs.finish(runs.start(stage, ablate_flags(inputs, folder)))
    return folder


@pytest.fixture(scope="module")
def tested(inputs, trained, tmp_path_factory):
    """A run that ablated without an interruption."""
    folder = runs.copy_run(trained, tmp_path_factory.mktemp("tested") / "run")
    runs.finish(runs.start("ablate", ablate_flags(inputs, folder)))
    return folder


def kill_after_a_behaviour(processes, folder):
    """Kill processes of an ablation once the first behaviour is on disk."""
    while not [*(folder / "ablate").rglob("agreement.json")]:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mesh"), [(1, dict()), (2, dict()), (2, dict(mesh__model=2))])
def test_killed_while_processes_ablate_they_end_as_one_does(inputs, trained, tested, tmp_path, processes, mesh):
    folder = runs.copy_run(trained, tmp_path / "run")
    flags = ablate_flags(inputs, folder, **mesh)
    start = functools.partial(runs.start_pair, count=processes) if processes > 1 else lambda *args: [runs.start(*args)]
    kill_after_a_behaviour(start("ablate", flags), folder)  # so that both must learn what there is
    outputs = [runs.finish(process) for process in start("ablate", flags)]
    assert ablated(folder).keys() == ablated(tested).keys()
    if processes == 1:
        assert "kept from an earlier run: agreement" in outputs[0] and ablated(folder) == ablated(tested)
    alone, together = (load_effects(run / "ablate" / "topk") for run in (tested, folder))
    whole = [[dataclasses.replace(edit, fraction=1.0) for edit in table.edits] for table in (together, alone)]
    assert whole[0] == whole[1]
    # A fraction that equalises doses divides two norms, which are rounded otherwise on several devices.
    fractions = [[edit.fraction for edit in table.edits] for table in (together, alone)]
    np.testing.assert_allclose(*fractions, rtol=1e-5)
    for column in ("edit_N", "prompt_N", "readout_N"):
        np.testing.assert_array_equal(getattr(together, column), getattr(alone, column))
    np.testing.assert_allclose(together.value_N, alone.value_N, atol=1e-4)
    for name in TWO["task__behaviours"].split(","):
        files = (Importance.file(run / "ablate" / "topk", name) for run in (tested, folder))
        alone, together = map(Importance.load, files)
        np.testing.assert_array_equal(together.feature, alone.feature)
        np.testing.assert_allclose(together.drop, alone.drop, atol=1e-5)


# Statement 13 of WORKSPACE.md, what must hold.
def test_two_processes_run_a_whole_pipeline_as_one(inputs, whole, tmp_path):
    """Capture in parts, ablation together, evaluation and behaviours dealt out."""
    runs.copy_units(whole[0], tmp_path / "run", "train")  # so that what is made of them is the same to rounding
    pair = runs.start_pair(MEASURE, runs.small_flags(*inputs, tmp_path / "run", **TWO))
    outputs = [runs.finish(process).splitlines() for process in pair]
    for number, lines in enumerate(outputs):
        assert all(f"process {number} of 2: " in line for line in lines[1:] if not line.startswith("[Gloo]")), lines
    done = [line.partition(": ")[2] for lines in outputs for line in lines if " done in " in line]
    assert len(set(done)) == len(done) == 4, done
    assert_as_one(whole[0], tmp_path / "run")


WIDE = dict(
    task__behaviours="agreement,capital", task__benchmarks="gsm8k", task__examples=4, task__shots=0,
    task__max_new_tokens=4, task__batch=1, study__benchmarks="gsm8k", causal__random_sets=2, causal__placebo_targets=2,
    probe__labels="answer", patch__kinds="resid_post,mlp_out", steer__dictionary="topk",
)  # fmt: skip
WIDE |= dict.fromkeys(
    ("train__kinds", "interpret__dictionaries", "transfer__dictionaries", "cluster__dictionaries"), "topk,standard"
)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("processes", [2, 4])
def test_every_stage_is_dealt_out_to_processes(inputs, tmp_path, processes):
    rows = [dict(question=f"What is {n} plus {n}?", answer=f"{n} + {n} = {2 * n}\n#### {2 * n}") for n in range(12)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {**WIDE, "task__path": tmp_path / "gsm8k.jsonl"}
    alone, several = tmp_path / "alone", tmp_path / "several"
    runs.finish(runs.start("pipeline", runs.small_flags(*inputs, alone, **flags)))
    runs.copy_units(alone, several, "train")
    for process in runs.start_pair("pipeline", runs.small_flags(*inputs, several, **flags), count=processes):
        runs.finish(process)
    assert_as_one(alone, several)

"""One of the processes of a run ends: the others end too and say which; started again it goes on where it was."""

import random
import time

import psutil
import pytest
import runs
from compared import assert_as_one

FEW = dict(train__kinds="topk", task__behaviours="agreement", ablate__baselines="")  # each start compiles all anew


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """An undisturbed run of two processes: its workdir and how long it took."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    clock = time.monotonic()
    for process in runs.start_pair("pipeline", runs.small_flags(*inputs, workdir, **FEW)):
        runs.finish(process)
    return workdir, time.monotonic() - clock


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_of_two_killed_at_random_moments_the_run_ends_with_the_same_bits(inputs, whole, tmp_path):
    workdir, seconds = whole
    moments, struck, number = random.Random(18), [], 0
    while len(struck) < 10:
        folder, victim = tmp_path / f"run{number}", moments.randrange(2)
        pair = runs.start_pair("pipeline", runs.small_flags(*inputs, folder, **FEW))
        time.sleep(moments.uniform(0.05, 1.0) * seconds)
        children = psutil.Process(pair[victim].pid).children()
        if children and all(process.poll() is None for process in pair):
            children[0].kill()
            clock = time.monotonic()
            said = runs.finish(pair[1 - victim], 143).splitlines()
            why = f"process {victim} was ended by signal 9, so this one ends"
            assert said[-1] == f"process {1 - victim} of 2: {why}", said
            before = runs.finish(pair[victim], 137).splitlines()
            struck.append((victim, round(time.monotonic() - clock, 1), before[-1] if before else "at its start"))
        else:  # it was done before the moment came: the next kill strikes a fresh run
            for process in pair:
                runs.finish(process)
            assert_as_one(workdir, folder)
            number += 1
    print(*struck, sep="\n")  # what it was doing, and the seconds until both had ended
    for process in runs.start_pair("pipeline", runs.small_flags(*inputs, folder, **FEW)):
        runs.finish(process)
    assert_as_one(workdir, folder)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["killed", "lost"])
def test_when_a_process_dies_the_others_end(inputs, whole, tmp_path, victim, how):
    runs.captured_only(whole[0], tmp_path / "run")
    flags = runs.small_flags(
        *inputs, tmp_path / "run", train__epochs=4000, train__checkpoint_every=100000, train__kinds="topk"
    )
    pair = runs.start_pair("train", flags)
    for line in pair[0].stdout:
        if "tokens/s" in line:
            break
    (child,) = psutil.Process(pair[victim].pid).children()
    (child if how == "killed" else pair[victim]).kill()  # with its node goes the parent, too
    clock = time.monotonic()
    said = runs.finish(pair[1 - victim], 143)
    print(f"after {time.monotonic() - clock:.0f} s")
    why = "was ended by signal 9" if how == "killed" else "is gone without a word"
    assert said.rstrip().endswith(f"process {1 - victim} of 2: process {victim} {why}, so this one ends")
    pair[victim].communicate()
    assert pair[victim].returncode == (137 if how == "killed" else -9)


def test_processes_with_different_flags_are_refused(inputs, tmp_path):
    pair = runs.start_pair("capture", runs.small_flags(*inputs, tmp_path / "run"), ["--train.k=5"])
    first, second = (runs.finish(process, 2) for process in pair)
    assert (
        "process 1 of 2: error: --train.k is [5] in process 1 and [8] in process 0: start all processes alike" in second
    )
    assert "process 0 of 2: process 1 was given bad input, so this one ends" in first
    assert "was killed" not in first + second  # whoever waits for another hears that it has ended
    assert not (tmp_path / "run" / "capture").exists()

"""One of the processes of a run ends: the others end too and say which; started again it goes on where it was."""

from functools import partial

import pytest
import runs
from compared import assert_as_one, kill_at_random_moments

FEW = dict(train__kinds="topk", task__behaviours="agreement", ablate__baselines="")  # each start compiles all anew
FEW |= dict(train__checkpoint_every=5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_of_two_killed_at_random_moments_the_run_ends_with_the_same_bits(inputs, tmp_path):
    def start(folder):
        return runs.start_pair("pipeline", runs.small_flags(*inputs, folder, **FEW))

    output, _ = (runs.finish(process) for process in start(tmp_path / "whole"))
    check = partial(assert_as_one, tmp_path / "whole")
    kill_at_random_moments(start, check, tmp_path, 10, output.count("\n"))


BUG = """
import dataclasses
import sys
from saejax.runner import pipeline
from saejax.cli import main
from saejax.parallel.cluster import joined_processes

def fail(run):
    if joined_processes().rank == 1:
        raise RuntimeError("UNAVAILABLE: NCCL, says a bug that comes every time")
    run.each(range(2), lambda item: run.folder / str(item), lambda item: (run.folder / str(item)).touch())

pipeline.all_stages()["baseline"] = dataclasses.replace(pipeline.all_stages()["baseline"], run=fail)
main("baseline")
"""


def test_a_bug_in_one_process_ends_all_with_status_1(inputs, tmp_path):
    pair = runs.start_pair(BUG, runs.small_flags(*inputs, tmp_path / "run"))
    first, second = (runs.finish(process, 1) for process in pair)
    assert "RuntimeError: UNAVAILABLE" in second and "process 0 of 2: process 1 failed, so this one ends" in first


def test_processes_with_different_flags_are_refused(inputs, tmp_path):
    pair = runs.start_pair("capture", runs.small_flags(*inputs, tmp_path / "run"), ["--capture.bos=never"])
    first, second = (runs.finish(process, 2) for process in pair)
    message = '--capture.bos is "never" in process 1 and "auto" in process 0: start all processes alike'
    assert f"process 1 of 2: error: {message}" in second
    assert "process 0 of 2: process 1 was given bad input, so this one ends" in first
    assert not list((tmp_path / "run").glob("capture*"))

"""How processes end when another one has ended: toys that do no work, each with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

from saejax.parallel import cluster, parent

TOY = """
import os, signal, sys, time
from pathlib import Path
from saejax.parallel import parent
folder, own, count, act = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
parent._ABORTED, parent._GRACE = 3.0, 1.5
early, act = act.startswith("early "), act.removeprefix("early ")
def work():
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    if not early:
        parent.joined(folder, "mark", own, count)
    print(os.getpid(), flush=True)
    sys.stdin.readline()  # all are there
    if act.startswith("exit"):
        return int(act[4:])
    if act == "bug":
        raise RuntimeError("a bug")
    if act.startswith("kill"):
        os.kill(os.getpid(), int(act[4:]))
    for _ in range(2400):
        time.sleep(0.05)
        if told and act == "saves":
            return 143
        if act == "follows" and os.listdir(folder / parent.FOLDER / "mark"):
            return parent.LOST
    return 0
sys.exit(parent.guarded(work, folder, count, own))
"""


@pytest.fixture
def ended(tmp_path):
    """A function that runs toys together: how each ended, and what it said."""

    def run(*acts, first=lambda processes: None):
        toys = []
        for own, act in enumerate(acts):
            command = [sys.executable, "-c", TOY, str(tmp_path), str(own), str(len(acts)), act]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            toys.append(subprocess.Popen(command, **pipes, text=True, cwd=runs.ROOT))
            children.append(int(toys[-1].stdout.readline()))
        for toy in toys:
            toy.stdin.write("\n")
            toy.stdin.flush()
        first(toys)
        said = [toy.communicate(timeout=600)[1].strip() for toy in toys]
        return [toy.returncode for toy in toys], said

    children = []
    yield run
    for child in children:  # none outlives its parent
        assert not (stat := Path(f"/proc/{child}/stat")).exists() or stat.read_text().split()[2] == "Z"


def test_all_end_well(ended, tmp_path):
    assert ended("exit0", "exit0") == ([0, 0], ["", ""])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("acts", "statuses", "why"),
    [
        (["saves", "exit2", "hangs"], [2, 2, 2], "process 1 was given bad input, so this one ends"),
        (["exit1", "saves"], [1, 1], "process 0 failed, so this one ends"),
        (["saves", "kill9"], [143, 137], "process 1 was ended by signal 9, so this one ends"),
        (["follows", "kill11"], [143, 139], "process 1 was ended by signal 11, so this one ends"),
        (["follows", "kill6"], [143, 134], "process 1 was ended by signal 6, so this one ends"),
        (["early hangs", "early exit2"], [2, 2], "process 1 was given bad input, so this one ends"),
        (["early kill9", "early saves"], [137, 143], "process 0 was ended by signal 9, so this one ends"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_when_one_ends_the_others_say_which_and_end(ended, acts, statuses, why):
    found, said = ended(*acts)
    assert found == statuses
    culprit = next(own for own, act in enumerate(acts) if act.removeprefix("early ").startswith(("exit", "kill")))
    for own, lines in enumerate(said):
        told = [] if own == culprit else [f"process {own} of {len(acts)}: {why}"]
        if acts[own].endswith("hangs"):
            told.insert(0, f"process {own} of {len(acts)}: did not end within 2 s of being asked to, and was killed")
        assert lines.splitlines() == told


def test_a_bug_is_told_with_its_traceback(ended):
    statuses, said = ended("bug", "waits")
    assert statuses[0] == 1 and "Traceback" in said[0] and "RuntimeError: a bug" in said[0]


def test_what_an_earlier_start_left_is_forgotten(tmp_path):
    first = parent.come(tmp_path, 1, 2)
    first.say("137")
    again = parent.come(tmp_path, 0, 2)
    assert again.others() == {} and not again.other_ended()
    first.say("stop")
    assert not again.other_ended()
    first.say("2")
    assert again.others() == {1: {"stop", "2"}} and again.other_ended()


def test_one_that_is_gone_without_a_word_is_named(ended):
    def lose(toys):
        toys[1].kill()  # as when its node is lost: the child goes with it
        toys[1].wait()

    found, said = ended("kill6", "hangs", first=lose)  # JAX aborts a process that hears no more of another one
    assert found == [143, -9] and said[0] == "process 0 of 2: process 1 is gone without a word, so this one ends"


def test_a_stop_that_one_is_asked_for_stops_all(ended):
    found, said = ended("saves", "saves", first=lambda toys: toys[1].send_signal(signal.SIGTERM))
    assert found == [143, 143] and said == ["", ""]


def test_a_process_is_missed_within_a_minute():
    assert cluster.HEARTBEAT + parent._ABORTED + 2 * parent._LOOK_EVERY < 60


def test_those_that_did_not_come_are_named(tmp_path):
    parent.come(tmp_path, 0, 4)
    parent.come(tmp_path, 2, 4)
    old = time.time() - 3 * parent.COME
    os.utime(tmp_path / parent.FOLDER / "come" / "2", (old, old))  # of an earlier run
    assert parent.not_come(tmp_path, 4).startswith("of 4 processes 1, 2, 3 did not come within 300 s")

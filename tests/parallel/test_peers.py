"""What processes tell one another and how work is dealt out to them, by threads and a store that is played."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from saejax.config import Configs
from saejax.errors import Interrupted, OtherEnded, UserError
from saejax.parallel.cluster import check_same
from saejax.parallel.peers import Peers
from saejax.parallel.teams import Left, Team, deal
from saejax.workspace import Run


class Store:
    """A coordination service's key-value store."""

    def __init__(self):
        self.values, self.counts, self.lock = {}, {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.lock:
            assert allow_overwrite or key not in self.values, key
            self.values[key] = value

    def key_value_dir_get(self, folder):
        with self.lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def key_value_increment(self, key, by):
        with self.lock:
            self.counts[key] = self.counts.get(key, 0) + by
            return self.counts[key]


def together(count, work, **settings):
    """What ``work`` gives for each of some processes, which are threads; what one raises is given, too."""
    store, found = Store(), [None] * count

    def one(own):
        try:
            found[own] = work(Peers(store, own, count, **settings))
        except BaseException as error:
            found[own] = error

    threads = [threading.Thread(target=one, args=[own]) for own in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_first_process_is_heard_by_all_as_often_as_it_speaks():
    def work(peers):
        time.sleep(0.05 * (2 - peers.own))  # those who ask come before it
        return [peers.tell("place", f"{peers.own} {time}") for time in range(3)]

    assert together(3, work) == [["0 0", "0 1", "0 2"]] * 3


def test_none_goes_on_before_all_have_come():
    came = []

    def work(peers):
        for number in range(3):
            time.sleep(0.02 * peers.own)
            came.append(number)
            peers.meet("place")
            assert came.count(number) == 4
        if peers.own % 2:  # some of them meet, too
            peers.meet("odd", [1, 3])

    assert together(4, work) == [None] * 4 and len(came) == 12


@pytest.mark.parametrize("steps", [0, 12])
def test_one_that_ends_no_step_is_named_and_one_that_works_is_waited_for(monkeypatch, steps):
    store, said = Store(), []
    waits, other = (Peers(store, own, 2, 10.0, said.append) for own in range(2))
    clock = iter(range(0, 10**6, 6))
    now = [0.0]

    def sleep(_):  # the other process works
        now[0] = next(clock)
        if now[0] < 60 * steps:
            other.step()
        elif steps:
            other.meet("place", [1])

    monkeypatch.setattr("saejax.parallel.peers.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    if steps:
        waits.meet("place")
        assert now[0] == 720 and said == [f"place: waiting for 1, {seconds} s" for seconds in (306, 612)]
    else:
        other.step()
        with pytest.raises(Interrupted, match=r"process 1 has ended no step in 10 s, .* \(place\)"):
            waits.meet("place")


def test_nobody_waits_for_one_that_has_ended():
    peers = Peers(Store(), 0, 2)
    peers.ended = lambda: True
    with pytest.raises(OtherEnded, match="place"):
        peers.meet("place")


def test_a_flag_that_differs_is_named():
    def work(peers):
        check_same(peers, {"--train.k": "8" if peers.own < 2 else "9", "jax": "1", **({"x": "1"} if peers.own else {})})

    alike, *others = together(3, work)
    assert alike is None and all(isinstance(one, UserError) for one in others)
    assert "x is 1 in process 1 and nothing in process 0" in str(others[0])
    assert "--train.k is 9 in process 2 and 8 in process 0: start all processes alike" in str(others[1])


@pytest.mark.parametrize(
    ("processes", "units", "size"), [(2, 5, 1), (3, 3, 1), (4, 3, 2), (4, 1, 4), (2, 0, 0), (1, 2, 1)]
)
def test_every_unit_is_done_by_one_team(processes, units, size):
    names = [f"unit{number}" for number in range(units)]

    def work(peers):
        return [(unit, team.leads, team.size) for unit, team in deal(peers, "stage", names)]

    done = [entry for own in together(processes, work) for entry in own]
    assert sorted(unit for unit, leads, _ in done if leads) == names  # once
    assert max((each for *_, each in done), default=0) == size
    assert len(done) == max(units, processes if units else 0)  # none is idle while there are units


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_items_are_made_once_and_the_first_process_goes_on(tmp_path, processes):
    made, said, both = [], [], threading.Barrier(min(processes, 2))

    def work(peers):
        team = Team(peers, "unit", range(processes))

        def say(line):
            if team.speaks:
                said.append((peers.own, line))

        run = Run("stage", "", tmp_path, Configs(), {}, say, team=team)

        def make(item):
            made.append((item, peers.own))
            if item in "ab":  # two processes make them at once
                both.wait(600)
            (tmp_path / item).write_text(item)
            run.say(item)

        run.each(["a", "b"], lambda item: tmp_path / item, make, last=False)
        assert {path.name for path in tmp_path.iterdir()} >= {"a", "b"}  # in every process
        run.say("between")
        run.each([*"abcdefg"], lambda item: tmp_path / item, make)
        return "joins"

    first, *others = together(processes, work)
    assert first == "joins" and all(isinstance(one, Left) for one in others)
    assert sorted(item for item, _ in made) == [*"abcdefg"]
    assert {*said} == {(own, item) for item, own in made} | {(0, "between")}


def test_alone_an_item_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "b").write_text("before")
    run = Run("stage", "", tmp_path, Configs(), {})
    run.each(["a", "b"], lambda item: tmp_path / item, lambda item: Path(tmp_path / item).write_text("now"))
    assert [(tmp_path / item).read_text() for item in "ab"] == ["now", "before"]

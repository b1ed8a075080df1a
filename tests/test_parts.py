"""How far a stage of several parts is."""

import re
from types import SimpleNamespace

import pytest

from saejax.errors import Interrupted
from saejax.runner import parts


@pytest.fixture
def seconds_to_go(monkeypatch):
    """The seconds to go that a stage of two parts prints, if any, as (clock, done, total) go by in each.

    Where parts are left, a pair: those of the part, which its counts and speed give, and those of the stage.
    """

    def read_lines(*of_parts):
        clock, lines = [0.0], []
        monkeypatch.setattr(parts.time, "monotonic", lambda: clock[0])
        run = SimpleNamespace(say=lines.append, stopping=lambda: False, share=SimpleNamespace(leads=True))
        progress = parts.Progress(run, "tokens")
        for index, counted in enumerate(of_parts):
            on_progress = progress.of_part(f"part {index}", len(of_parts) - index - 1)
            for clock[0], done, total in counted:
                on_progress(done, total)
        pattern = r"([\d,]+) of ([\d,]+) tokens, (\d+)/s, (\d+) s to go(?:, (\d+) s with the (\d) after it)?$"
        found = [match for line in lines if (match := re.search(pattern, line))]
        times = []
        for match in found:
            done, total, speed, seconds = (int(number.replace(",", "")) for number in match.groups()[:4])
            assert (total - done) / speed == seconds, match[0]
            times.append((seconds, int(match[5])) if match[5] else seconds)
        return times

    return read_lines


def test_compiling_and_what_an_earlier_run_did_are_no_speed(seconds_to_go):
    # The first count, after which nothing is known, gives no time to go.
    assert seconds_to_go([(100, 10, 1000), (110, 110, 1000), (120, 210, 1000)]) == [89, 79]
    assert seconds_to_go([(1, 500, 1000), (11, 600, 1000)]) == [40]  # half was kept from an earlier run


def test_parts_that_are_left_take_as_long_as_this_one(seconds_to_go):
    first = [(0, 0, 100), (10, 10, 100), (20, 20, 100), (100, 100, 100)]
    assert seconds_to_go(first, [(110, 10, 100)]) == [(80, 180), 90]
    # Work that is counted from 0 again, within a part.
    assert seconds_to_go([(1, 10, 20), (2, 20, 20), (11, 10, 80)]) == [35]


@pytest.mark.parametrize("name", ["started", "claim", "done", "stack", "removed"])
def test_a_part_of_any_name_is_no_file_of_the_unit(tmp_path, name):
    """A prompt may begin with "Done", and so may be called."""
    run = SimpleNamespace(folder=tmp_path)
    assert parts.part_file(run, name) != tmp_path / f"{name}.json"
    assert parts.part_file(run, name, "-graph") == tmp_path / f"{name}-graph"


def test_a_part_that_has_no_work_is_not_begun_where_the_run_is_to_stop(tmp_path):
    share, lines = SimpleNamespace(leads=True, processes=None), []
    run = SimpleNamespace(
        stage="probe", name="topk", folder=tmp_path, say=lines.append, stopping=lambda: True, share=share
    )
    with pytest.raises(Interrupted, match=r"^probe: part \(1 of 1\): stopped"):
        parts.each_part(run, ["part"], lambda: lambda part, on_progress: parts.Measured({}, "nothing to do"), dict)
    assert not lines and not [*tmp_path.iterdir()]

"""Stacks are written when no step ends, and only then."""

import sys
import time

from saejax.parallel import watchdog


def test_where_a_run_hangs_is_written(tmp_path, monkeypatch):
    with open(tmp_path / "stderr", "w+") as written:
        monkeypatch.setattr(sys, "__stderr__", written)
        with watchdog.watched(0.05, lambda: False):
            while "test_where_a_run_hangs" not in (tmp_path / "stderr").read_text():
                time.sleep(0.01)
        length = len((tmp_path / "stderr").read_text())
        time.sleep(0.1)
        assert len((tmp_path / "stderr").read_text()) == length


def test_steps_that_end_put_it_off(monkeypatch):
    armed, steps, now = [], [], [0.0]
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *args, **options: armed.append(args))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    asked = iter([False, False, True])
    with watchdog.watched(600.0, lambda: next(asked), lambda: steps.append(now[0])) as stopping:
        assert not stopping() and not stopping()
        assert len(armed) == 1  # no thread for each of many short steps
        now[0] = 7.0
        assert stopping()
    assert armed == [(600.0,)] * 2 and steps == [0.0, 0.0, 0.0, 7.0]


def test_none_is_written_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *args, **options: 1 / 0)
    with watchdog.watched(0.0, lambda: True) as stopping:
        assert stopping()

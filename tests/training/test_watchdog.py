"""Stacks are written when no step ends, and only then."""

import sys
import time

from saejax.training import watchdog


def test_where_a_run_hangs_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "PATIENCE", 0.05)
    with open(tmp_path / "stderr", "w+") as written:
        monkeypatch.setattr(sys, "__stderr__", written)
        with watchdog.Watchdog():
            while "test_where_a_run_hangs" not in (tmp_path / "stderr").read_text():
                time.sleep(0.01)
        length = len((tmp_path / "stderr").read_text())
        time.sleep(0.1)
        assert len((tmp_path / "stderr").read_text()) == length


def test_steps_that_end_put_it_off(monkeypatch):
    armed = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *args, **options: armed.append(args))
    monkeypatch.setattr(watchdog, "PATIENCE", 1e9)
    with watchdog.Watchdog() as dog:
        for _ in range(3):
            dog.step_ended()
        assert len(armed) == 1  # no thread for each of many short steps
        monkeypatch.setattr(watchdog, "PATIENCE", -1.0)
        dog.step_ended()
    assert len(armed) == 2

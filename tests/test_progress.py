"""Bars of calls that take long: in a terminal, a console or a notebook alone."""

import io
import sys

from saejax import progress
from saejax.activations import progress as text_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_shown_where_somebody_looks_on(monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    for stream, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.show_progress("capture") as on_progress:
            for done, total in ((0, 0), (3, 10), (10, 10)):
                on_progress(done, total)
        assert ("capture" in stream.getvalue()) == is_shown


def test_lines_say_how_far_work_is_until_it_is_done(monkeypatch):
    """Of work whose amount is known when it begins, in a stage; each call asks whether to stop."""
    clock, lines, asked = iter([0.0, 6.0, 6.0, 7.0, 12.0, 12.0]), [], []
    monkeypatch.setattr(text_progress.time, "monotonic", lambda: next(clock))
    on_progress = text_progress.say_progress(lines.append, "losses", lambda: asked.append(True))
    for done in (10, 20, 30, 40):
        on_progress(done, 40)
    assert lines == [
        "losses: 10 of 40 tokens  2 tokens/s  18 s to go",
        "losses: 30 of 40 tokens  2 tokens/s  4 s to go",
    ]
    assert len(asked) == 4

"""Bars of calls that take long: in a terminal, a console or a notebook alone."""

import io
import sys

from saejax import progress


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

"""A study: all units of its rows, and then the report of their results."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from saejax.config import to_json
from saejax.errors import CheckFailed
from saejax.files import fingerprint, read_json
from saejax.runner.workspace import Workspace, hold_claim
from saejax.studies import report
from saejax.studies.gather import gather
from saejax.studies.rows import StudyRow
from saejax.studies.shares import shares
from saejax.studies.units import run_rows
from saejax.versions import hash_code


def run_study_rows(
    workdir: str | os.PathLike,
    rows: Sequence[StudyRow],
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
    at_once: int = 1,
    take_over: bool = False,
) -> None:
    """Run all rows and write the report.

    Args:
      workdir: the study's folder.
      rows: what to run.
      say: writes a line of progress.
      stopping: whether the process was asked to stop.
      at_once: rows that run side by side, each on its share of the host's GPUs, or else of its cores.
      take_over: replace the claims of processes that are not known to be gone, also in the workdirs of the rows.

    Raises:
      UserError: the folder cannot be written to, or another study works in it; the host cannot be shared so.
      CheckFailed: a unit failed; the report is written all the same.
      Interrupted: asked to stop, and saved.
    """
    parts, root = shares(at_once), Workspace(workdir).root
    with hold_claim(root, f"the study in {root}", take_over):
        states = run_rows(root, rows, say, stopping, parts, take_over)
        mark = fingerprint([[vars(state) for state in states], [_settings(row) for row in rows], hash_code()])
        path = root / report.FILE
        if path.exists() and read_json(path).get("fingerprint") == mark:
            say(f"all done before, unchanged: {root / 'index.html'}")
        else:
            say("the report: reading the results of all rows")
            report.write_report(root, gather(root, rows, states, mark))
            say(f"open {root / 'index.html'}")
    if failed := [state for state in states if state.state == "failed"]:
        first = failed[0]
        raise CheckFailed(
            f"{len(failed)} of {len(states)} units: {first.row}, {first.unit}: {first.reason}"
            f"{' (and others)' if len(failed) > 1 else ''}: {root / 'index.html'} says which and why; run the same "
            "command to try them again"
        )


def _settings(row: StudyRow) -> list[Any]:
    """Return all settings of a row: the page reads some that change no unit, such as ``--study.control``."""
    return [row.name, *map(to_json, row.configs)]

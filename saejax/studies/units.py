"""The rows of a study at work: each is the pipeline in a process of its own, so what fails stops no other row.

1. The first stage of every row runs before all else: what does not fit is known before hours are spent.
2. Rows run one after the other, or several at once, each with its share of the host. A row whose units are all finished
   takes no process. The pipeline itself goes on with units that do not read what has failed.
3. The state of each unit is read off the row's workdir and what its process said.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from saejax.errors import Interrupted, UserError
from saejax.runner.pipeline import without_decoder_stages
from saejax.runner.registry import all_stages
from saejax.runner.stage import split_unit
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import Workspace
from saejax.studies.results import UnitState
from saejax.studies.row_process import RowProcess
from saejax.studies.rows import StudyRow
from saejax.studies.shares import Share
from saejax.studies.sheet import duration

ROWS, LOGS = "rows", "logs"
_CHILD = 'from saejax.cli import main; main("pipeline")'
_LOOK_EVERY, _SAY_EVERY = 0.2, 30.0  # seconds
_STOPPED = "what is done is kept: run the same command to go on"


class RowUnits:
    """The units of a row, and the processes that make them.

    Args:
      root: the study's folder.
      row: the row.
      take_over: replace claims of processes on other hosts; those of this host are waited for.
    """

    def __init__(self, root: Path, row: StudyRow, take_over: bool = False):
        self._take_over = take_over
        self.name, self.workspace = row.name, Workspace(root / ROWS / row.name)
        self._root, self._row, self._plan = root, row, Workplan(row.configs)
        self._asked: Sequence[str] = ()  # units that the process at work may make
        self._reasons: dict[str, str] = {}  # unit -> why it failed
        self._was_killed = False
        self._bad_settings = ""
        try:
            stages = [
                all_stages()[name] for name in without_decoder_stages([*all_stages()], row.configs, lambda line: None)
            ]
            units = {unit: stage.first for stage in stages for unit in stage.units(row.configs)}
        except UserError as error:  # such as a text to follow without dictionaries
            self._bad_settings, units = str(error), {}
        self._units, self._first = list(units), [unit for unit, is_first in units.items() if is_first]

    def left(self, first: bool) -> list[str]:
        """Return units, of the first stage or all, that are not done, have not failed, and read what is there."""
        left = [state.unit for state in self.states() if state.state == "failed" and not state.reason]
        return [unit for unit in left if not first or unit in self._first]

    def start(self, first: bool, share: Share) -> RowProcess:
        """Start a process that makes the unit of the first stage, or all units that can be made."""
        # What was killed, as for want of memory, would be so again: the others are made one by one.
        is_single = first or self._was_killed
        self._asked = self.left(first)[:1] if is_single else self._units
        only = [f"--unit={unit}" for unit in self._asked] if is_single else []
        options = [f"--workdir={self.workspace.root}", "--keep_going", *only]
        options += ["--take_over"] if self._take_over else []
        command = [sys.executable, "-c", _CHILD, *options, *self._row.argv]
        return RowProcess(command, self._root / LOGS / f"{self.name}.log", share)

    def end(self, process: RowProcess) -> dict[str, str]:
        """Return the units that have failed in a process that has ended, and why."""
        failed = process.failed_units()
        left = [unit for unit in self.left(False) if unit in self._asked and unit not in failed]
        # A process that is killed has not come to what follows the unit at work.
        self._was_killed |= process.was_killed
        failed |= dict.fromkeys(left[:1] if process.was_killed else left, process.why_it_failed())
        self._reasons |= failed
        return failed

    def is_claimed(self) -> bool:
        """Return whether a process makes a unit: a child of a study that was killed saves before it ends."""
        for unit in self._units:
            with contextlib.suppress(UserError):  # ``states`` says what cannot be read
                if self.workspace.is_claimed(unit, self._plan.fingerprint(unit), self._take_over):
                    return True
        return False

    def states(self) -> list[UnitState]:
        """Return the state of every unit; one that is left to do counts as failed without a reason."""
        if self._bad_settings:
            return [_failed(self.name, "settings", self._bad_settings)]
        states: dict[str, UnitState] = {}
        for unit in self._units:
            states[unit] = self._state(unit, states)
        return list(states.values())

    def _state(self, unit: str, earlier: Mapping[str, UnitState]) -> UnitState:
        log = self.workspace.root / LOGS / f"{unit.replace('/', '-')}.log"
        path = str(log.relative_to(self._root)) if log.exists() else ""
        state = _failed(self.name, unit, self._reasons.get(unit, ""), path)
        try:
            needs = [] if unit in self._first else [*self._first, *self._plan.needs(unit)]
            for need in (split_unit(name)[0] for name in needs):
                if need not in earlier or earlier[need].state != "done":
                    return dataclasses.replace(state, state="not run", reason=f"{need} is not done", log="")
            state = dataclasses.replace(state, fingerprint=self._plan.fingerprint(unit))
            if self._plan.is_done(self.workspace, unit):
                self.workspace.point(unit, state.fingerprint)
                return dataclasses.replace(state, state="done", reason="")
        except UserError as error:
            return dataclasses.replace(state, reason=str(error))
        return state


def _failed(row: str, unit: str, reason: str, log: str = "") -> UnitState:
    return UnitState(row=row, unit=unit, state="failed", reason=reason, log=log, fingerprint="")


def run_rows(
    root: Path,
    rows: Sequence[StudyRow],
    say: Callable[[str], None],
    stopping: Callable[[], bool],
    shares: Sequence[Share] = (Share(),),
    take_over: bool = False,
) -> list[UnitState]:
    """Run what is not finished.

    Args:
      root: the study's folder.
      rows: what to run.
      say: writes a line of progress.
      stopping: whether the process was asked to stop.
      shares: parts of the host; as many rows run at once.
      take_over: replace claims of processes on other hosts, which would be waited for.

    Returns:
      How all units ended, row by row.

    Raises:
      Interrupted: asked to stop; the rows at work have saved what they had.
    """
    every = [RowUnits(root, row, take_over) for row in rows]
    for state in (state for row in every for state in row.states()):
        if state.state == "failed" and state.reason:  # now, not in hours: no process will say it
            say(f"{state.row}  {state.unit}: failed: {state.reason}")
    for first in (True, False):
        _run_side_by_side([row for row in every if row.left(first)], first, say, stopping, shares)
    return [state for row in every for state in row.states()]


def _run_side_by_side(
    rows: Sequence[RowUnits],
    first: bool,
    say: Callable[[str], None],
    stopping: Callable[[], bool],
    shares: Sequence[Share],
) -> None:
    """Run the first stage of rows, or all of them, as many at once as there are shares."""
    waiting, running, free, reported = list(rows), dict[RowUnits, RowProcess](), list(shares), set[RowUnits]()
    longest = 0.0  # seconds of the longest row that ended

    def check_stop() -> None:
        if stopping():
            names = ", ".join(row.name for row in running)
            raise Interrupted(f"stopped{' in ' if names else ''}{names}; {_STOPPED}")

    try:
        while waiting or running:
            check_stop()
            claimed = {row for row in waiting if free and row.is_claimed()}
            for row in claimed - reported:
                say(f"{row.name}: waiting for another process in {row.workspace.root}")
            reported |= claimed
            for row in [row for row in waiting if row not in claimed][: len(free)]:
                waiting.remove(row)
                if not row.left(first):  # the process that it waited for has made them
                    continue
                say(f"{row.name}: started, {_count_done(row)} before")
                running[row] = row.start(first, free.pop())
            for row, process in list(running.items()):
                if process.ended(_LOOK_EVERY / len(running)):
                    check_stop()  # the signal may have ended the row, too: that is no failure
                    free.append(running.pop(row).share)
                    longest = max(longest, process.seconds)
                    for unit, why in row.end(process).items():
                        say(f"{row.name}  {unit}: failed: {why}")
                    say(f"{row.name}: {_count_done(row)} after {duration(process.seconds)}")
                    waiting += [row] if row.left(first) else []
                elif time.monotonic() - process.last_report > _SAY_EVERY:
                    process.last_report = time.monotonic()
                    to_go = _time_to_go(longest, [unit.seconds for unit in running.values()], len(waiting), len(shares))
                    say(f"{row.name}  {process.last_line or 'starting'}{to_go}")
            if not running and waiting:
                time.sleep(_LOOK_EVERY)
    finally:
        for process in running.values():
            process.ask_to_stop()
        for process in running.values():
            process.ended(within=None)


def _time_to_go(longest: float, running: Sequence[float], waiting: int, at_once: int) -> str:
    """Return in words the time that is left, if every row takes as long as the longest; "" before a row has ended.

    Args:
      longest: seconds of the longest row that has ended; 0: none has.
      running: seconds for which the rows at work have run.
      waiting: rows that wait.
      at_once: rows that run at once.
    """
    if not longest:
        return ""
    # A row that takes longer than any before is not known to end soon.
    left = sum(max(longest - seconds, 0.1 * seconds) for seconds in running) + longest * waiting
    return f"; about {duration(left / min(at_once, max(len(running), 1)))} to go in all"


def _count_done(row: RowUnits) -> str:
    states = row.states()
    return f"{sum(state.state == 'done' for state in states)} of {len(states)} units done"

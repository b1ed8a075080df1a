"""The units of a study's rows, each run in a process of its own: what fails stops no other row.

One after the other, or several at once, each of another row, with its share of the host. Units that read what is not
there are not run.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from saejax.errors import Interrupted, UserError
from saejax.files import read_object
from saejax.preflight.results import PreflightResults
from saejax.results import load_results
from saejax.runner.registry import STAGES
from saejax.runner.stage import split_unit
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import SUMMARY, Workspace
from saejax.studies.progress import Key, TimeToGo
from saejax.studies.results import UnitState
from saejax.studies.rows import StudyRow
from saejax.studies.shares import Share
from saejax.studies.sheet import duration
from saejax.studies.unit_process import UnitProcess

ROWS, LOGS = "rows", "logs"
_CHILD = "from saejax.experiments import pipeline; pipeline()"
_LOOK_EVERY, _SAY_EVERY = 0.2, 30.0  # seconds
_STOPPED = "what is done is kept: run the same command to go on"


@dataclasses.dataclass
class _Running:
    """A unit at work."""

    process: UnitProcess
    share: Share
    fingerprint: str
    last_report: float = dataclasses.field(default_factory=time.monotonic)  #: when its progress was last logged


class StudyUnits:
    """The units of all rows.

    Args:
      root: the study's folder.
      stopping: whether the process was asked to stop.
      shares: parts of the host; so many units run at once, each of another row.
    """

    def __init__(
        self,
        root: Path,
        rows: Sequence[StudyRow],
        say: Callable[[str], None],
        stopping: Callable[[], bool],
        shares: Sequence[Share] = (Share(),),
    ):
        self._root, self._say, self._stopping = root, say, stopping
        self._rows = {row.name: row for row in rows}
        self._plans = {row.name: Workplan(row.configs) for row in rows}
        self._states: dict[Key, UnitState] = {}
        self._waiting: list[Key] = []
        self._running: dict[Key, _Running] = {}
        self._shares = list(shares)  # those that are free
        self._time = TimeToGo(len(shares))

    def run(self) -> list[UnitState]:
        """Run what is not finished, the first stage of every row before all else.

        Returns:
          How they ended, row by row.

        Raises:
          Interrupted: asked to stop; the units at work have saved what they had.
        """
        every = self._every()
        self._waiting = list(every)
        try:
            while self._waiting or self._running:
                if self._stopping():
                    self._interrupt()
                while self._shares and (key := self._next()):
                    self._waiting.remove(key)
                    self._begin(key)
                self._look()
        finally:
            for running in self._running.values():
                running.process.ask_to_stop()
            for running in self._running.values():
                running.process.ended(within=None)
        unread = [state for key, state in self._states.items() if key not in every]
        return unread + [self._states[key] for key in every]

    def _every(self) -> list[Key]:
        every: list[Key] = []
        for row in self._rows.values():
            try:
                units = [unit for stage in STAGES.values() for unit in stage.units(row.configs)]
            except UserError as error:  # such as a file of prompts that is not there
                key = (row.name, "settings")
                self._states[key] = UnitState(*key, "failed", str(error), "", "")
                self._say(f"{row.name}: {error}")
            else:
                every += [(row.name, unit) for unit in units]
        return sorted(every, key=lambda key: not _is_first(key[1]))

    def _next(self) -> Key | None:
        """Return the first unit that waits whose row has none at work."""
        busy = {row for row, _ in self._running}
        return next((key for key in self._waiting if key[0] not in busy), None)

    def _begin(self, key: Key) -> None:
        """Start a unit, unless it is finished or cannot run."""
        row, unit = key
        plan, workspace = self._plans[row], Workspace(self._root / ROWS / row)
        firsts = [first for name, first in self._states if name == row and _is_first(first)]
        try:
            for need in [*firsts, *(split_unit(need)[0] for need in plan.needs(unit))]:
                if (row, need) not in self._states or self._states[row, need].state != "done":
                    return self._ended(key, "not run", f"{need} is not done")
            mark = plan.fingerprint(unit)
        except UserError as error:
            return self._ended(key, "failed", str(error))
        if plan.is_done(workspace, unit):
            workspace.point(unit, mark)
            return self._ended(key, "done", mark=mark, ran=self._log(key).exists())
        self._wait_for(workspace, row, unit, mark)
        command = [sys.executable, "-c", _CHILD, f"--workdir={workspace.root}", f"--unit={unit}", *self._rows[row].argv]
        done, units = sum(state.state == "done" for state in self._states.values()), len(self._states)
        share = self._shares.pop()
        self._running[key] = _Running(UnitProcess(command, self._log(key), share), share, mark)
        about = f"{done} of {units + len(self._running) + len(self._waiting)} units done"
        self._say(f"{row}  {unit}: started; {about}, {self._left()} to go")

    def _look(self) -> None:
        """Take the units that have ended, and log the progress of the others now and then."""
        for key, running in list(self._running.items()):
            if running.process.ended(_LOOK_EVERY / len(self._running)):
                self._take(key)
            elif time.monotonic() - running.last_report > _SAY_EVERY:
                running.last_report = time.monotonic()
                last = running.process.last_line or f"{key[1]}: starting"
                self._say(f"{key[0]}  {last}; {self._left()} to go in all")

    def _take(self, key: Key) -> None:
        """Note how a unit's process ended."""
        running = self._running.pop(key)
        self._shares.append(running.share)
        if why := running.process.why_it_failed():
            self._ended(key, "failed", why, running.fingerprint, ran=True)
        else:
            self._say(f"{key[0]}  {key[1]}: done in {duration(running.process.seconds)}")
            self._ended(key, "done", mark=running.fingerprint, ran=True)

    def _ended(
        self, key: Key, state: Literal["done", "failed", "not run"], why: str = "", mark: str = "", ran: bool = False
    ) -> None:
        if state == "failed":
            self._say(f"{key[0]}  {key[1]}: failed: {why}")
        log = str(self._log(key).relative_to(self._root)) if ran else ""
        self._states[key] = UnitState(*key, state, why, log, mark)
        self._learn(key)

    def _learn(self, key: Key) -> None:
        """Record the unit's duration and, after preflight, the durations to expect of the row."""
        units = [unit for row, unit in (*self._states, *self._running, *self._waiting) if row == key[0]]
        if self._states[key].state == "done":
            folder = self._root / ROWS / key[0] / key[1]
            if _is_first(key[1]):
                results = load_results(folder)
                self._time.expect(key[0], units, results.seconds or {} if isinstance(results, PreflightResults) else {})
            self._time.took(*key, read_object(folder / SUMMARY, "seconds")["seconds"])
        elif _is_first(key[1]):  # nothing of this row will run
            self._time.expect(key[0], units, dict.fromkeys(STAGES, 0.0))

    def _left(self) -> str:
        """Return in words how long all units still take."""
        elapsed = {key: running.process.seconds for key, running in self._running.items()}
        seconds = self._time.left(self._waiting, elapsed)
        return "an unknown time" if seconds is None else duration(seconds)

    def _log(self, key: Key) -> Path:
        return self._root / LOGS / key[0] / (key[1].replace("/", "-") + ".log")

    def _wait_for(self, workspace: Workspace, row: str, unit: str, mark: str) -> None:
        """Wait until nobody makes a unit: a child of a study that was killed saves before it ends."""
        if workspace.is_claimed(unit, mark):
            self._say(f"{row}: waiting for another process to finish {unit} in {workspace.root}")
        while workspace.is_claimed(unit, mark):
            if self._stopping():
                self._interrupt()
            time.sleep(_LOOK_EVERY)

    def _interrupt(self) -> NoReturn:
        """End the study; the units at work are asked to save what they have."""
        names = [", ".join(key) for key in self._running]
        raise Interrupted(f"stopped{' in ' if names else ''}{' and in '.join(names)}; {_STOPPED}")


def _is_first(unit: str) -> bool:
    stage = unit.partition("/")[0]
    return stage in STAGES and STAGES[stage].first

"""The units of a study's rows, each run in a process of its own, one after the other: what fails stops no other row.

Every child is the pipeline on one unit. So its memory is its own, its output a file, and whatever ends it (bad input, a
bug, the system for want of memory) leaves a unit with its reason. Units that read what is not there are not run.
"""

import contextlib
import dataclasses
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from saejax.errors import Interrupted, UserError
from saejax.parallel.parent import end_with_parent
from saejax.pipeline import Workplan
from saejax.preflight.results import PreflightResults
from saejax.registry import STAGES
from saejax.results import load_results
from saejax.studies.progress import Key, TimeToGo, duration
from saejax.studies.rows import StudyRow
from saejax.workspace import SUMMARY, Workspace, now, read_json

ROWS, LOGS = "rows", "logs"
_CHILD = "from saejax.experiments import pipeline; pipeline()"
_LOOK_EVERY, _SAY_EVERY = 0.2, 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class UnitState:
    """How a unit of a row ended."""

    row: str  #: its name
    unit: str  #: such as "train/topk"
    state: Literal["done", "failed", "not run"]  #: "not run": it reads what is not there
    reason: str  #: why it is not done; "" if it is
    log: str  #: what it said: a file of the study's folder; "" if it never ran
    fingerprint: str  #: of its settings and inputs; "" where these could not be read


class StudyUnits:
    """The units of all rows.

    Args:
      root: the study's folder.
      rows: its rows.
      say: prints a line.
      stopping: whether the process was asked to stop.
    """

    def __init__(self, root: Path, rows: Sequence[StudyRow], say: Callable[[str], None], stopping: Callable[[], bool]):
        self._root, self._say, self._stopping = root, say, stopping
        self._rows = {row.name: row for row in rows}
        self._plans = {row.name: Workplan(row.configs) for row in rows}
        self._states: dict[Key, UnitState] = {}
        self._time = TimeToGo()

    def run(self) -> list[UnitState]:
        """Runs what is not finished, the first stage of every row before all else.

        Raises:
          Interrupted: asked to stop; the unit at work has saved what it had.
        """
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
        every.sort(key=lambda key: not _is_first(key[1]))
        for place, key in enumerate(every):
            if self._stopping():
                raise Interrupted("stopped; what is done is kept: run the same command to go on")
            self._states[key] = self._advance(key, every[place + 1 :])
            self._learn(key, [unit for name, unit in every if name == key[0]])
        return list(self._states.values())

    def _advance(self, key: Key, waiting: Sequence[Key]) -> UnitState:
        row, unit = key
        plan, workspace = self._plans[row], Workspace(self._root / ROWS / row)
        firsts = [other for name, other in self._states if name == row and _is_first(other)]
        mark = log = ""
        try:
            for need in [*firsts, *plan.needs(unit)]:
                if (row, need) not in self._states or self._states[row, need].state != "done":
                    return self._ended(key, "not run", f"{need} is not done", log, mark)
            mark = plan.mark(unit)
            stage, _, name = unit.partition("/")
            if workspace.finished(stage, name, mark):
                return self._ended(key, "done", "", str(self._log(key)) if self._path(key).exists() else "", mark)
            log = str(self._log(key))
            why = self._run(key, workspace, waiting)
            return self._ended(key, "failed" if why else "done", why, log, mark)
        except UserError as error:
            return self._ended(key, "failed", str(error), log, mark)

    def _ended(self, key: Key, state: Literal["done", "failed", "not run"], why: str, log: str, mark: str) -> UnitState:
        if state == "failed":
            self._say(f"{key[0]}  {key[1]}: failed: {why}")
        return UnitState(*key, state, why, log, mark)

    def _learn(self, key: Key, units: Sequence[str]) -> None:
        """How long it took, and after preflight what to expect of the row."""
        if self._states[key].state == "done":
            folder = self._root / ROWS / key[0] / key[1]
            if _is_first(key[1]):
                results = load_results(folder)
                self._time.expect(key[0], units, results.seconds or {} if isinstance(results, PreflightResults) else {})
            self._time.took(*key, read_json(folder / SUMMARY)["seconds"])
        elif _is_first(key[1]):  # nothing of this row will run
            self._time.expect(key[0], units, dict.fromkeys(STAGES, 0.0))

    def _log(self, key: Key) -> Path:
        return Path(LOGS, key[0], key[1].replace("/", "-") + ".log")

    def _path(self, key: Key) -> Path:
        return self._root / self._log(key)

    def _run(self, key: Key, workspace: Workspace, waiting: Sequence[Key]) -> str:
        """Runs a unit's process to its end; gives why it failed, "" if it did not."""
        row, unit = key
        self._wait_for(workspace, row)
        path, done = self._path(key), sum(state.state == "done" for state in self._states.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", _CHILD, f"--workdir={workspace.root}", f"--unit={unit}", *self._rows[row].argv]
        about = f"{done} of {len(self._states) + 1 + len(waiting)} units done"
        self._say(f"{row}  {unit}: started; {about}, {duration(self._time.left(waiting, key))} to go")
        stop_with_parent = functools.partial(end_with_parent, os.getpid(), signal.SIGTERM)
        with open(path, "ab") as log:
            log.write(f"=== {now()} {shlex.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=stop_with_parent
            )
        seconds = self._watch(child, key, waiting, start)
        if not child.returncode:
            self._say(f"{row}  {unit}: done in {duration(seconds)}")
            return ""
        if self._stopping():
            raise Interrupted(f"stopped in {row}, {unit}; what is done is kept: run the same command to go on")
        return _why(child.returncode, path.read_bytes()[start:].decode(errors="replace"))

    def _watch(self, child: subprocess.Popen, key: Key, waiting: Sequence[Key], before: int) -> float:
        """Waits for a child's end, says now and then how far it is, hands on the wish to stop; seconds it took.

        Args:
          child: the process.
          key: what it runs.
          waiting: units that come after it.
          before: bytes of its log that others wrote.
        """
        start = said = time.monotonic()
        asked = False
        while child.poll() is None:
            if self._stopping() and not asked:
                child.send_signal(signal.SIGTERM)
                asked = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_LOOK_EVERY)  # no longer than it runs
            clock = time.monotonic()
            if clock - said > _SAY_EVERY:
                said = clock
                own = self._path(key).read_bytes()[before:].decode(errors="replace")
                last = _last_line(own) or f"{key[1]}: starting"
                left = self._time.left(waiting, key, clock - start)
                self._say(f"{key[0]}  {last.strip()}; {duration(left)} to go in all")
        return time.monotonic() - start

    def _wait_for(self, workspace: Workspace, row: str) -> None:
        """Waits until nobody holds a row's folder: a child of a study that was killed saves before it ends."""
        if not workspace.is_free():
            self._say(f"{row}: waiting for another process, which works in {workspace.root}")
        while not workspace.is_free():
            if self._stopping():
                raise Interrupted("stopped; what is done is kept: run the same command to go on")
            time.sleep(_LOOK_EVERY)


def _is_first(unit: str) -> bool:
    stage = unit.partition("/")[0]
    return stage in STAGES and STAGES[stage].first


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def _why(status: int, output: str) -> str:
    """Why a child failed: the last line that it wrote, or the signal that ended it."""
    last = _last_line(output).strip().removeprefix("error: ").removeprefix("failed: ")
    if status < 0:
        name = signal.Signals(-status).name
        memory = ", as the system ends processes when memory runs out" if -status == signal.SIGKILL else ""
        return f"ended by {name}{memory}; the last line before: {last}"
    return last or f"ended with status {status} and said nothing"

"""Results that a stage keeps part by part, and its progress.

A *part* is a piece of work whose results are saved as soon as it is finished, in ``<part>.json``: a behaviour, or a
label of probes. A run that was killed goes on with the next part.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saejax.errors import Interrupted
from saejax.files import read_json, write_json
from saejax.parallel.collectives import AgreedStop, from_first_process, is_first_process
from saejax.progress import OnProgress
from saejax.results import from_json, to_json
from saejax.runner.workspace import CLAIM, STACK, STARTED, SUMMARY, Run, Workspace

_SAY_EVERY = 5.0  # seconds


class Measured(NamedTuple):
    """The results of a part, and what to say of them in a line."""

    results: Any  # a class of results
    message: str


Measure = Callable[[str, OnProgress], Measured]  # of the part of this name


def part_file(run: Run, part: str, ending: str = ".json") -> Path:
    """Return the file of a part's results, or with another ending of what belongs to them."""
    # A prompt, a label or a behaviour may be called "done", as a file of every unit is.
    taken = f"{part}{ending}" in (STARTED, CLAIM, SUMMARY, STACK, Workspace.REMOVED)
    return run.folder / f"{part}{'-part' if taken else ''}{ending}"


def each_part(
    run: Run,
    parts: Sequence[str],
    begin: Callable[[], Measure],
    results: Any,
    unit: str = "tokens",
    mark: Callable[[str], str] = lambda part: "",
) -> dict[str, Any]:
    """Return the results of all parts, in their order: those kept from an earlier run, and the others measured.

    Parts are items of ``Run.make_each``: where processes share them, only the first process uses the returned results.

    Args:
      run: the unit.
      parts: names of the parts, and of their files.
      begin: called once, if a part is left to measure. Returns the function that measures a part and writes the part's
        other files.
      results: the class of a part's results.
      unit: unit of the progress messages, such as "tokens".
      mark: what the line about a part's results says behind its name, such as ``Tested.mark``.

    Raises:
      Interrupted: the run is to stop; finished parts are kept.
    """
    # The first process alone looks: it may write the next file before another process would look for it.
    has_file = from_first_process(np.array([part_file(run, part).exists() for part in parts], np.int32))
    kept = {part: part_file(run, part) for part, is_kept in zip(parts, has_file, strict=True) if is_kept}
    by_part = {part: from_json(results, read_json(path), path) for part, path in kept.items()}
    if by_part:
        run.say(f"kept from an earlier run: {', '.join(by_part)}")
    left = [part for part in parts if part not in by_part]
    measure, progress = functools.cache(begin), Progress(run, unit)

    def make(part: str) -> None:
        # The line begins with the unit's name.
        label = "the prompt" if part == run.name else f"{part} ({parts.index(part) + 1} of {len(parts)})"
        on_progress = progress.of_part(label, len(left) - left.index(part) - 1)
        on_progress(0, 0)  # asks whether to stop: a part may have no work, and then asks nowhere else
        run.say(f"{label}: started")  # programs are compiled before anything is counted
        by_part[part], message = measure()(part, on_progress)
        if is_first_process():
            write_json(part_file(run, part), to_json(by_part[part]))  # written last: it marks the part as done
        run.say(f"{label}{mark(part)}: {message}")

    if run.share.processes:
        run.make_each(parts, functools.partial(part_file, run), make)
    else:
        for part in left:
            make(part)
    for part in left:
        if part not in by_part:  # another process made it
            by_part[part] = from_json(results, read_json(part_file(run, part)), part_file(run, part))
    return {part: by_part[part] for part in parts}


class Progress:
    """Progress of a stage: says now and then how far it is, and raises ``Interrupted`` when it is to stop.

    The first time to go is this part's, as its counts and speed are. The second is the stage's: as much work as this
    part has for each part that is left. The speed is that since work was first counted. Earlier time does not count:
    programs were compiled then, once, or an earlier run did the work. Of a part that counts its work from 0 again, only
    the work that has begun is known.

    Args:
      run: the unit.
      unit: what is counted, for messages.
    """

    def __init__(self, run: Run, unit: str):
        self._run, self._unit, self._stop = run, unit, AgreedStop(run.stopping)
        self._said, self._work = time.monotonic(), 0
        self._counted: tuple[float, int] | None = None  # when work was counted first, and how much

    def of_part(self, label: str, left: int) -> OnProgress:
        """Return the progress function of the next part, called ``label``; after it ``left`` parts remain."""
        work_before, last = self._work, 0

        def on_progress(done: int, total: int) -> None:
            nonlocal last
            if self._stop():
                raise Interrupted(
                    f"{self._run.stage}: {label}: stopped; what was measured is kept: run the same command to go on"
                )
            self._work += done - last if done >= last else done
            last, now = done, time.monotonic()
            if self._counted is None and done:
                self._counted = now, self._work
            if self._run.share.leads and now - self._said > _SAY_EVERY and 0 < done < total:
                start, work = self._counted or (now, 0)
                speed_and_time = ""
                # The first work counted took what is compiled and read once: its speed says nothing.
                if now - start > _SAY_EVERY and self._work > work:
                    speed = (self._work - work) / (now - start)
                    whole_part = self._work - work_before + total - done
                    rate = f"{speed:,.0f}/s" if speed >= 1 else f"{60 * speed:.1f}/min"
                    speed_and_time = f", {rate}, {(total - done) / speed:.0f} s to go"
                    if left:
                        seconds = (total - done + left * whole_part) / speed
                        speed_and_time += f", {seconds:.0f} s with the {left} after it"
                self._run.say(f"{label}: {done:,} of {total:,} {self._unit}{speed_and_time}")
                self._said = now

        return on_progress

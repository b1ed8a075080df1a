"""Training for longer, or with another fine-tuning: a run goes on from one before it that is the same up to some step.

Two runs that differ in their length alone do the same steps until the learning rate of one of them begins to fall. The
shorter one keeps its checkpoint of their last common step. A longer one takes it over, with the records up to it, and
ends with the bits of a run from the start. A penalty whose weight rises over a share of all steps differs from the
first step on. Two runs of one length that differ in their fine-tuning alone have all steps of training in common.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.dictionaries import kinds
from saejax.files import read_object, unfinished_folder, write_json
from saejax.training.checkpoints import RUN
from saejax.training.metrics import METRICS
from saejax.training.optimizer import decay_start
from saejax.training.stack import TrainStack

CHECKPOINTS = "checkpoints"
# The settings of a run that its first steps do not depend on: how long it is, and how it is fine-tuned afterwards.
LATER = ("train.epochs", "train.max_steps", "train.kl_steps", "train.kl_learning_rate")


def go_on_from_earlier(
    stack: TrainStack, run: Mapping[str, Any], folder: Path, earlier: Sequence[Path], say: Callable[[str], None]
) -> None:
    """Take over the state of an earlier run that begins as this one, if this one has not begun; the first process does.

    Args:
      stack: what is trained.
      run: description of the run, as in ``Checkpoints.check_or_record_run``.
      folder: of its checkpoints and metrics, perhaps from such an earlier run.
      earlier: such folders of other runs, of the same members and inputs.
      say: logs which run it goes on from, or why from none.
    """
    checkpoints = folder / CHECKPOINTS
    begun = _read_run(checkpoints)
    if begun is not None and (begun == run or not _begins_alike(begun, run)):
        return
    runs = {place: before for place in (folder, *earlier) if (before := _read_run(place / CHECKPOINTS)) is not None}
    runs = {place: before for place, before in runs.items() if _begins_alike(before, run)}
    if not runs:
        return
    usable: dict[int, Path] = {}
    reason = f"{next(iter(runs))} has no checkpoint from before its learning rate fell"
    if type(stack.kind).penalty is not kinds.Kind.penalty and stack.config.penalty_warmup:
        runs = {place: before for place, before in runs.items() if before["steps"] == stack.steps}
        reason = "--train.penalty_warmup is a share of all steps, which are others now"
    for place, before in runs.items():
        last = min(decay_start(stack.config, before["steps"]), decay_start(stack.config, stack.steps))
        last = stack.steps if before["steps"] == stack.steps else last
        usable |= {step: place for step in _steps(place / CHECKPOINTS) if 0 < step <= last}
    if not usable:
        # States of another length in the folder itself are refused, see ``Checkpoints``.
        return None if begun else say(f"trained from the start: {reason}")
    step = max(usable)
    place = usable[step]
    if place == folder:
        for later in _steps(checkpoints):
            if later > step:
                shutil.rmtree(checkpoints / str(later))
    else:
        try:
            _copy_checkpoint(place, folder, step)
        except OSError as error:  # shutil's error, too
            return say(f"trained from the start: the checkpoint in {place} could not be copied: {error}")
    write_json(checkpoints / RUN, run)
    # The dictionaries that it saved midway were written where its results are.
    lacking = f"; dictionaries are saved after step {step} only" if stack.config.save_every and place != folder else ""
    say(f"going on from step {step} of a run of {runs[place]['steps']} steps in {place}{lacking}")


def _copy_checkpoint(place: Path, folder: Path, step: int) -> None:
    """Copy the checkpoint of a step, and the records, to the folder of another run."""
    checkpoints = folder / CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    if (place / METRICS).exists():
        shutil.copyfile(place / METRICS, folder / METRICS)  # a run drops the records after its checkpoint
    # A run that was killed here before has it already, and whole.
    if not (checkpoints / str(step)).exists():
        with unfinished_folder(checkpoints) as unfinished:
            shutil.copytree(place / CHECKPOINTS / str(step), unfinished / str(step), copy_function=_link_or_copy)
            os.replace(unfinished / str(step), checkpoints / str(step))


def _begins_alike(before: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Return whether two descriptions of runs differ in nothing but ``LATER`` and the number of steps."""

    def rest(run: Mapping[str, Any]) -> dict[str, Any]:
        settings = {name: value for name, value in run["settings"].items() if name not in LATER}
        return {**run, "settings": settings, "steps": 0}

    return rest(before) == rest(run)


def _read_run(checkpoints: Path) -> dict[str, Any] | None:
    """Return the description of the run whose checkpoints are in a folder; None if there are none."""
    return read_object(checkpoints / RUN, "settings", "steps") if (checkpoints / RUN).exists() else None


def _steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder; half-written ones have no number as name."""
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())


def _link_or_copy(source: str, target: str) -> None:
    """Link a file, which nobody changes, or copy it where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

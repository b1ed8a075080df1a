"""The training loop: feeds the step, never waits for it, saves, and stops cleanly."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from saejax.errors import Interrupted, UserError
from saejax.files import whole_file
from saejax.parallel.collectives import AgreedStop, is_first_process
from saejax.training.checkpoints import Checkpoints
from saejax.training.inputs import Input
from saejax.training.step import TrainState
from saejax.training.writers import Writer

_HEAD = ("step", "tokens", "seconds", "member")  # of a record, before its metrics


@dataclasses.dataclass
class Metrics:
    """Records the step's metrics one step late, so that reading them never holds up the device.

    Args:
      path: ``metrics.jsonl``: a line for each recorded step and member. Lines after ``first_step``, which a killed run
        wrote, are dropped.
      first_step: the step training starts or resumes at.
      batch: tokens per step.
      every: steps between records.
      steps: steps of the whole run, for the time to go.
      members: their names; "" for a stack of one.
      say: prints a progress line.
      writers: take each record too.
    """

    path: Path
    first_step: int
    batch: int
    every: int
    steps: int
    members: Sequence[str]
    say: Callable[[str], None]
    writers: Sequence[Writer] = ()

    def __post_init__(self):
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been cut off
        self.records = [record for record in whole if record["step"] <= self.first_step]
        if len(self.records) < len(lines) and is_first_process():
            with whole_file(self.path) as beside:
                beside.write_text("".join(_line(record) for record in self.records))
        self._parts = 0, len(self.records)  # where the last two parts begin that are to be or have been written
        self._before = self.seconds
        self._start = self._said = time.monotonic()
        self._read = 0.0  # seconds at which the newest metrics were there
        self._warm: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training up to the newest record, over all runs that led to it."""
        return self.records[-1]["seconds"] if self.records else 0.0

    def last(self, member: str) -> dict[str, float]:
        """The newest metrics of a member."""
        record = next(record for record in reversed(self.records) if record["member"] == member)
        return {key: value for key, value in record.items() if key not in _HEAD}

    def means(self, after: int) -> dict[str, float] | None:
        """Means over the members and over the records of the steps after this one; None if there are none."""
        records = [record for record in self.records if record["step"] > after]
        names = [name for name in records[0] if name not in _HEAD] if records else []
        return {name: float(np.mean([record[name] for record in records])) for name in names} or None

    def push(self, step: int, metrics: dict[str, jax.Array], count: int = 1) -> None:
        """Takes the metrics of the steps just dispatched; reads those of the steps before, if they are due.

        Waits for those before, so that the host runs one program ahead of the device and no further: batches do not
        pile up in the device's memory.

        Args:
          step: the last of these steps.
          metrics: [M], or [N, M] with these steps in its first rows.
          count: number of these steps.
        """
        if self._pending is not None:
            jax.block_until_ready(self._pending[2])
        self.flush()
        self._pending = (step, count, metrics)

    def flush(self, check: bool = False) -> None:
        """Reads what is pending: the losses, and the other metrics if they are due for a record.

        Args:
          check: read all in any case, to know that they are finite.

        Raises:
          UserError: a metric is not finite; the message names it, the member and the step.
        """
        if self._pending is None:
            return
        (last, count, metrics), self._pending = self._pending, None
        first = last - count + 1
        seconds = time.monotonic() - self._start
        due = [step for step in range(first, last + 1) if step % self.every == 0 or step == self.steps]
        finite = np.isfinite(np.asarray(metrics["loss"])).all()
        if due or check or self._warm is None or not finite:
            values = {
                name: np.asarray(value, np.float64).reshape(-1, len(self.members))[:count]
                for name, value in metrics.items()
            }
            self._check(first, values)
            for step in due:
                at = self._read + (step - first + 1) / count * (seconds - self._read)
                self._record(step, at, {name: value_NxM[step - first] for name, value_NxM in values.items()})
        if self._warm is None:
            self._warm = (last, seconds)  # the first step compiled: it says nothing about speed
        self._read = seconds

    def _check(self, first: int, values: dict[str, np.ndarray]) -> None:
        """A ``UserError`` for the first value that is not finite, of values [steps, M] from step ``first`` on."""
        wrong = [(*place, name) for name, value_NxM in values.items() for place in np.argwhere(~np.isfinite(value_NxM))]
        if wrong:
            place, index, name = min(wrong)
            member = f" of member {self.members[index]}" if self.members[index] else ""
            raise UserError(
                f"{name}{member} is {values[name][place, index]} at step {first + place}: lower --train.learning_rate; "
                "the last checkpoint is kept"
            )

    def _record(self, step: int, seconds: float, values: dict[str, np.ndarray]) -> None:
        head = dict(step=step, tokens=step * self.batch, seconds=round(self._before + seconds, 3))
        for index, member in enumerate(self.members):
            own = {name: float(value_M[index]) for name, value_M in values.items()}
            self.records.append(head | dict(member=member) | own)
            for writer in self.writers:
                writer.write(step, member, own)
        self._progress(step, seconds, {name: float(value_M.mean()) for name, value_M in values.items()})

    def _progress(self, step: int, seconds: float, means: dict[str, float]) -> None:
        now = time.monotonic()
        if now - self._said < 5 and step != self.steps:
            return
        self._said = now
        rate = self.tokens_per_second(step, seconds)
        left = f"{(self.steps - step) * self.batch / rate:.0f} s to go" if rate else "timing"
        self.say(
            f"step {step}/{self.steps}  {rate:,.0f} tokens/s  {left}  loss {means['loss']:.1f}  "
            f"L0 {means['l0']:.1f}  explained variance {means['explained_variance']:.3f}"
        )

    def tokens_per_second(self, step: int | None = None, seconds: float | None = None) -> float:
        """Each member's speed since the first step of this process, compilation left out; 0 before there is any.

        Args:
          step: steps done; None: those of the last record.
          seconds: of this process; None: until now.
        """
        step = self.records[-1]["step"] if step is None else step
        seconds = self.seconds - self._before if seconds is None else seconds
        if self._warm is None or step <= self._warm[0] or seconds <= self._warm[1]:
            return 0.0
        return (step - self._warm[0]) * self.batch / (seconds - self._warm[1])

    def write(self) -> None:
        """Adds the records since the last time to the file; the first process does. Forgets older ones."""
        old, new = self._parts
        if new == len(self.records):
            return
        if is_first_process():
            with open(self.path, "a") as file:
                file.write("".join(map(_line, self.records[new:])))
                file.flush()
                os.fsync(file.fileno())
        del self.records[:old]
        self._parts = new - old, len(self.records)


def _line(record: Mapping[str, float | str]) -> str:
    return json.dumps(record) + "\n"


def train(
    source: Input,
    state: TrainState,
    first_step: int,
    steps: int,
    metrics: Metrics,
    checkpoints: Checkpoints,
    every: int,
    stopping: Callable[[], bool],
) -> TrainState:
    """Runs steps ``first_step`` to ``steps``.

    Args:
      source: runs the steps.
      state: the state after ``first_step`` steps; donated.
      first_step, steps: where to start, and the number of steps of the whole run.
      checkpoints: takes the state every ``every`` steps, at the end, and when stopping.
      stopping: whether the process was asked to stop.

    Raises:
      Interrupted: it was asked to stop; the state is saved.
    """
    step, agreed_stop = first_step, AgreedStop(stopping)
    while step < steps:
        upto = min(steps, step - step % every + every)
        state, values, count = source.advance(state, step, upto)
        step += count
        if count:
            metrics.push(step, values, count)
        stop = agreed_stop() or not count
        if step == upto or (stop and step > first_step):
            metrics.flush(check=True)  # a state whose loss is not finite must not become the newest checkpoint
            metrics.write()
            checkpoints.save(step, state, metrics.means(after=(step - 1) // every * every))
        if stop and step < steps:
            checkpoints.wait()
            raise Interrupted(f"stopped at step {step} of {steps}; saved: run the same command to go on")
    checkpoints.wait()
    return state

"""The training loop: feeds the step, never waits for it, saves, and stops cleanly."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from saejax.errors import Interrupted, UserError
from saejax.parallel import is_first_process
from saejax.training.checkpoints import Checkpoints
from saejax.training.step import Trainer, TrainState
from saejax.workspace import whole_file


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
    """

    path: Path
    first_step: int
    batch: int
    every: int
    steps: int
    members: Sequence[str]
    say: Callable[[str], None]

    def __post_init__(self):
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.records = [record for record in map(json.loads, lines) if record["step"] <= self.first_step]
        self._before = self.seconds
        self._start = self._said = time.monotonic()
        self._warm: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training up to the newest record, over all runs that led to it."""
        return self.records[-1]["seconds"] if self.records else 0.0

    def last(self, member: str) -> dict[str, float]:
        """The newest metrics of a member."""
        record = next(record for record in reversed(self.records) if record["member"] == member)
        return {key: value for key, value in record.items() if key not in ("step", "tokens", "seconds", "member")}

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics [M] of the step just dispatched; reads those of the one before, if they are due.

        Waits for the step before, so that the host runs one step ahead of the device and no further: batches
        do not pile up in the device's memory.
        """
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
        self.flush()
        self._pending = (step, metrics)

    def flush(self, check: bool = False) -> None:
        """Reads what is pending and due for a record.

        Args:
          check: read it in any case, to know that it is finite.

        Raises:
          UserError: a metric is not finite; the message names it, the member and the step.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        due = step % self.every == 0 or step == self.steps or self._warm is None
        if not due and not check:
            return
        values = {name: np.asarray(value_M, np.float64) for name, value_M in metrics.items()}
        for name, value_M in values.items():
            for index in np.flatnonzero(~np.isfinite(value_M))[:1]:
                member = f" of member {self.members[index]}" if self.members[index] else ""
                raise UserError(
                    f"{name}{member} is {value_M[index]} at step {step}: lower --train.learning_rate; the last "
                    "checkpoint is kept"
                )
        seconds = time.monotonic() - self._start
        if self._warm is None:
            self._warm = (step, seconds)  # the first step compiled: it says nothing about speed
        if step % self.every == 0 or step == self.steps:
            head = dict(step=step, tokens=step * self.batch, seconds=round(self._before + seconds, 3))
            for index, member in enumerate(self.members):
                own = {name: float(value_M[index]) for name, value_M in values.items()}
                self.records.append(head | dict(member=member) | own)
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
        """Speed since the first step of this process, compilation left out; 0 before there is any. Each member's."""
        step = self.records[-1]["step"] if step is None else step
        seconds = self.seconds - self._before if seconds is None else seconds
        if self._warm is None or step <= self._warm[0] or seconds <= self._warm[1]:
            return 0.0
        return (step - self._warm[0]) * self.batch / (seconds - self._warm[1])

    def write(self) -> None:
        """Writes all records; the first process does."""
        if is_first_process():
            with whole_file(self.path) as beside:
                beside.write_text("".join(json.dumps(record) + "\n" for record in self.records))


def train(
    trainer: Trainer,
    state: TrainState,
    batches: Iterable[tuple[np.ndarray, ...]],
    first_step: int,
    steps: int,
    metrics: Metrics,
    checkpoints: Checkpoints,
    every: int,
    stopping: Callable[[], bool],
) -> TrainState:
    """Runs steps ``first_step`` to ``steps``.

    Args:
      trainer: gives the step and the batch's sharding.
      state: the state after ``first_step`` steps; donated.
      batches: this process's rows of each batch, arrays [sites, batch / processes, d], the first for step
        ``first_step``.
      first_step, steps: where to start, and the number of steps of the whole run.
      metrics: takes the metrics.
      checkpoints: takes the state every ``every`` steps, at the end, and when stopping.
      stopping: whether the process was asked to stop.

    Raises:
      Interrupted: it was asked to stop; the state is saved.
    """
    step = first_step
    for step, batch in enumerate(batches, first_step + 1):
        global_batch = tuple(jax.make_array_from_process_local_data(trainer.batch_sharding, part) for part in batch)
        state, values = trainer.step(state, global_batch)
        metrics.push(step, values)
        stop = _agreed_stop(step, stopping)
        if step == steps or stop or step % every == 0:
            _save(step, state, metrics, checkpoints)
        if step == steps:
            break
        if stop:
            raise Interrupted(f"stopped at step {step} of {steps}; saved: run the same command to go on")
    return state


def _save(step: int, state: Any, metrics: Metrics, checkpoints: Checkpoints) -> None:
    metrics.flush(check=True)  # a state whose loss is not finite must not become the newest checkpoint
    metrics.write()
    checkpoints.save(step, state)


def _agreed_stop(step: int, stopping: Callable[[], bool]) -> bool:
    """Whether to stop after this step; all processes give the same answer, or none could save."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return stopping()

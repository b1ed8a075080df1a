"""Metrics of training: recorded one step late; written as ``metrics.jsonl`` and as runs of wandb.

A record has ``step``, ``tokens``, ``seconds`` and ``member``; ``tokens_per_second`` of each member and
``tflop_per_second`` of the whole program since the first step of the process, compilation left out; ``mfu``, the share
of the devices' peak, where that is known; and the metrics of the step, with ``held_out_`` before scores on held-out
tokens. The steps of fine-tuning (``--train.kl_steps``) follow the steps of training, without rates and with ``kl``;
they count the tokens at which the dictionary's output stood.
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from saejax.config import own_settings, to_json
from saejax.errors import UserError
from saejax.files import fingerprint, whole_file
from saejax.flops import peak_flops, step_flops, weights_share
from saejax.parallel.collectives import is_first_process
from saejax.training.held_out import PREFIX
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack

METRICS = "metrics.jsonl"
_PROGRESS_SECONDS = 5.0
_OF_KINDS = dict(sparsity="l0_coefficient", pre_activation="pre_activation")  # coefficients of terms of the loss
_FAR_LARGER = 1e6  # a term of the loss so many times the error is what overflowed
_HEAD = ("step", "tokens", "seconds", "tokens_per_second", "tflop_per_second", "mfu", "member")  # before the metrics


class Metrics:
    """Records of one run. Metrics are read one step late, so that reading them never holds up the device.

    Args:
      stack: what is trained.
      path: ``metrics.jsonl``; lines after ``first_step``, which a killed run wrote, are dropped.
      first_step: step at which training starts or resumes.
      say: logs a progress line.
      wandb: takes each record too.

    Raises:
      UserError: the file is damaged, or lacks the records of a run that has done all steps.
    """

    def __init__(
        self,
        stack: TrainStack,
        path: Path,
        first_step: int,
        say: Callable[[str], None],
        wandb: "Wandb | None" = None,
    ):
        self._stack, self._path, self._say, self._wandb = stack, path, say, wandb
        self._members, self._steps = [member.name for member in stack.members], stack.steps
        # Of all members: XLA counts the body of a scan over members once.
        count, active = len(stack.members), stack.dictionary.k if stack.products == "rows" else None
        sizes = stack.config.batch, stack.dictionary.d_in, stack.dictionary.n_features
        step = step_flops(*sizes, active, stack.dictionary.d_out)
        self._step_flops = weights_share(stack.config.form, count) * count * step
        self._peak_flops = peak_flops(stack.mesh.devices.flat[0], stack.config.matmul)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        # Records after the checkpoint were of steps that are done again.
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            complete = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been cut off
            self.records = [record for record in complete if record["step"] <= first_step]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: delete {path.parent} and run the same command again") from None
        if first_step == self._steps and not self.records:
            raise UserError(f"{path} is missing or empty: delete {path.parent} and run the same command again")
        if len(self.records) < len(lines) and is_first_process():
            with whole_file(path) as temporary:
                temporary.write_text("".join(map(record_line, self.records)))
        self._old, self._new = 0, len(self.records)  # indices of the first record since each of the last two writes
        self._seconds_before = self.seconds
        self._start = self._last_line = time.monotonic()
        self._warm: tuple[int, float] | None = None  # step and seconds at which the program was compiled

    @property
    def seconds(self) -> float:
        """Seconds of training up to the last record, over all runs that led to it."""
        return self.records[-1]["seconds"] if self.records else 0.0

    def last(self, member: str) -> dict[str, float]:
        """Return the last metrics of a member, without scores on held-out tokens, which the last step may lack."""
        record = next(record for record in reversed(self.records) if record["member"] == member)
        return {key: value for key, value in record.items() if key not in _HEAD and not key.startswith(PREFIX)}

    def add_finetuning(self, records: Sequence[Sequence[Mapping[str, float]]]) -> None:
        """Write the metrics of each member and step of fine-tuning, as of the steps that follow training."""
        steps, every = len(records[0]), self._stack.config.log_every
        # A step takes whole documents, and so about ``batch`` tokens: replaced tokens are counted.
        trained = self._steps * self._stack.config.batch
        tokens = [
            trained + np.cumsum([record["tokens"] for record in of_member]).astype(np.int64) for of_member in records
        ]
        # Step by step, though members were tuned one after the other: wandb takes rising steps alone.
        for step in (step for step in range(1, steps + 1) if step % every == 0 or step == steps):
            for member, of_member, tokens_S in zip(self._members, records, tokens, strict=True):
                head = dict(step=self._steps + step, tokens=int(tokens_S[step - 1]), seconds=self.seconds)
                values = {name: value for name, value in of_member[step - 1].items() if name != "tokens"}
                self.records.append({**head, "member": member, **values})
                if self._wandb:
                    self._wandb.write(self._steps + step, member, values)
        self.write()

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics [M] of the step just dispatched, and read the metrics of the step before.

        This waits for the step before, so that the host runs one step ahead of the device and no further: batches do
        not pile up in the device's memory.
        """
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
        self.flush()
        self._pending = (step, metrics)

    def flush(self, check: bool = False) -> None:
        """Read what is pending: the loss, and the other metrics if they are due for a record.

        Args:
          check: read all in any case, to know that they are finite.

        Raises:
          UserError: a metric is not finite; the message names it, the member and the step.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        seconds = time.monotonic() - self._start
        is_scored = any(name.startswith(PREFIX) for name in metrics)
        due = step % self._stack.config.log_every == 0 or step == self._steps or is_scored
        # Reading the loss alone each step is cheap; the other metrics are fetched when they are due.
        finite = np.isfinite(np.asarray(metrics["loss"])).all()
        if due or check or self._warm is None or not finite:
            values = {name: np.asarray(value_M, np.float64) for name, value_M in metrics.items()}
            self._check(step, values)
            if due:
                self._record(step, seconds, values)
        if self._warm is None:
            self._warm = (step, seconds)  # the first step was compiled: it says nothing about speed

    def _check(self, step: int, values: dict[str, np.ndarray]) -> None:
        """Raise a ``UserError`` for the first value that is not finite."""
        # A score may have no value: nothing to recover of the cross-entropy.
        checked = {name: value_M for name, value_M in values.items() if not name.startswith(PREFIX)}
        wrong = [(i, name) for name, value_M in checked.items() for i in np.flatnonzero(~np.isfinite(value_M))]
        if wrong:
            index, name = min(wrong)
            member = f" of member {self._members[index]}" if self._members[index] else ""
            cause = self._cause(int(index), values)
            raise UserError(
                f"{name}{member} is {values[name][index]} at step {step}: lower --train.{cause}; "
                "the last checkpoint is kept"
            )

    def _cause(self, index: int, values: Mapping[str, np.ndarray]) -> str:
        """Return the setting that made a member's values infinite.

        It is the coefficient of a term of the loss that is far larger than the error, or else the learning rate.
        """
        kind = self._stack.kind
        coefficients = {name: name for name in ("auxk", "decorrelation", "alignment")}
        read = own_settings(kind.Settings)
        coefficients |= {term: f"{kind.name}.{name}" for term, name in _OF_KINDS.items() if name in read}
        coefficients |= dict(sparsity="l1") if "l1" in kind.reads else {}
        limit = _FAR_LARGER * max(values["error"][index], 1.0)
        terms = {name: abs(values[name][index]) for name in coefficients.keys() & values.keys()}
        largest = max(terms, key=lambda name: np.nan_to_num(terms[name], nan=np.inf), default="")
        # With an error that is no number itself, all terms are none: nothing tells them apart.
        if terms and not terms[largest] <= limit and limit < np.inf:
            return coefficients[largest]
        # Decay that takes away more than twice a weight makes it grow.
        grows = self._stack.config.weight_decay * values["learning_rate"][index] > 2
        return "weight_decay" if grows else "learning_rate"

    def _record(self, step: int, seconds: float, values: dict[str, np.ndarray]) -> None:
        batch = self._stack.config.batch
        head: dict[str, Any] = dict(step=step, tokens=step * batch, seconds=round(self._seconds_before + seconds, 3))
        head |= self._throughput(step, seconds)
        for index, member in enumerate(self._members):
            metrics = {name: float(value_M[index]) for name, value_M in values.items() if np.isfinite(value_M[index])}
            self.records.append(head | dict(member=member) | metrics)
            if self._wandb:
                self._wandb.write(step, member, metrics)
        now = time.monotonic()
        is_scored = any(name.startswith(PREFIX) for name in values)
        if now - self._last_line >= _PROGRESS_SECONDS or step == self._steps or is_scored:
            self._last_line = now
            self._say(_progress_line(self._steps, batch, head, {name: float(v.mean()) for name, v in values.items()}))

    def _throughput(self, step: int, seconds: float) -> dict[str, float]:
        """Return the rates since the first step of this process; empty before there are any."""
        rate = self.tokens_per_second(step, seconds)
        if not rate:
            return {}
        flops = rate / self._stack.config.batch * self._step_flops
        rates = dict(tokens_per_second=rate, tflop_per_second=flops / 1e12)
        if self._peak_flops:
            rates["mfu"] = flops / (self._peak_flops * self._stack.mesh.size)
        return {name: float(f"{value:.4g}") for name, value in rates.items()}

    def tokens_per_second(self, step: int | None = None, seconds: float | None = None) -> float:
        """Return each member's speed since the first step of this process, compilation left out; 0 before there is any.

        Args:
          step: number of steps done; None: the last record's, without those of fine-tuning.
          seconds: seconds of this process; None: up to the last record.
        """
        step = min(self.records[-1]["step"], self._steps) if step is None else step
        seconds = self.seconds - self._seconds_before if seconds is None else seconds
        if self._warm is None or step <= self._warm[0] or seconds <= self._warm[1]:
            return 0.0
        return (step - self._warm[0]) * self._stack.config.batch / (seconds - self._warm[1])

    def write(self) -> None:
        """Append the records since the last time to the file (the first process does), and forget older ones."""
        if self._new == len(self.records):
            return
        if is_first_process():
            with open(self._path, "a") as file:
                file.write("".join(map(record_line, self.records[self._new :])))
                file.flush()
                os.fsync(file.fileno())
        # Two intervals are kept: the last metrics of each member are asked for after the final write.
        del self.records[: self._old]
        self._old, self._new = self._new - self._old, len(self.records)


def _progress_line(steps: int, batch: int, head: Mapping[str, float], means: Mapping[str, float]) -> str:
    rate = head.get("tokens_per_second")
    speed = "timing"
    if rate:
        mfu = f" ({head['mfu']:.0%} of peak)" if "mfu" in head else ""
        left = (steps - head["step"]) * batch / rate
        tflops = head["tflop_per_second"]
        tflops_text = f"{tflops:,.0f}" if tflops >= 100 else f"{tflops:.3g}"  # of 1000 and more .3g has an exponent
        speed = f"{rate:,.0f} tokens/s  {tflops_text} TFLOP/s{mfu}  {left:.0f} s to go"
    scores = f"L0 {means['l0']:.1f}  explained variance {means['explained_variance']:.3f}"
    held_out = {name.removeprefix(PREFIX): mean for name, mean in means.items() if name.startswith(PREFIX)}
    if held_out:
        scores += (
            f"; on held-out tokens L0 {held_out['l0']:.1f}  explained variance {held_out['explained_variance']:.3f}  "
            f"dead {held_out['dead']:.1%}"
        )
    if np.isfinite(held_out.get("ce_recovered", np.nan)):
        scores += f"  cross-entropy recovered {held_out['ce_recovered']:.3f}"
    return f"step {head['step']}/{steps}  {speed}  loss {means['loss']:.1f}  {scores}"


def record_line(record: Mapping[str, float | str]) -> str:
    """Return the line of ``metrics.jsonl`` for a record."""
    return json.dumps(record) + "\n"


class Wandb:
    """A run of Weights & Biases; offline with WANDB_MODE=offline in the environment. Members are prefixes of metrics.

    An interrupted run goes on in the same run of wandb. Each of several numbers of features is a run.

    Args:
      config: ``config.wandb`` is the project, or "entity/project".
      folder: folder of the metrics; a training that goes on there goes on in the same run of wandb.
      name: name of the run, such as "demo/topk".
      parent: where wandb writes, in ``wandb/``.
      started: text that tells this training from an earlier one in the same folder.

    Raises:
      UserError: the package is not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path, name: str, parent: Path, started: str = ""):
        try:
            library: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                f"--train.wandb takes the package wandb, which cannot be imported ({error}): pip install "
                "'saejax[wandb]', or leave the flag out"
            ) from None
        entity, _, project = config.wandb.rpartition("/")
        self._run = library.init(
            project=project,
            entity=entity or None,
            name=name,
            id=fingerprint(dict(folder=str(folder.absolute()), started=started)),
            resume="allow",
            dir=str(parent),
            config=to_json(config),
            settings=library.Settings(silent=True),
        )

    def write(self, step: int, member: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a member under the step."""
        prefix = f"{member}/" if member else ""
        self._run.log({f"{prefix}{name}": value for name, value in metrics.items()}, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._run.finish()

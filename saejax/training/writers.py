"""Metrics for people: TensorBoard event files and wandb runs, written beside ``metrics.jsonl``.

Both libraries are optional and are imported only when they are asked for. The members of a stack are runs of their own
in TensorBoard, and prefixes of the metrics' names in wandb.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from saejax.errors import UserError
from saejax.parallel.collectives import is_first_process
from saejax.runner.config import to_json
from saejax.runner.workspace import fingerprint
from saejax.settings import TrainConfig


class Writer(Protocol):
    """Takes metrics as they are recorded."""

    def write(self, step: int, member: str, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a member after a step."""
        ...

    def close(self) -> None:
        """Sees to it that all is written."""
        ...


def make_writers(config: TrainConfig, folder: Path, name: str, first_step: int) -> Sequence[Writer]:
    """The writers that the settings ask for; none in processes other than the first.

    Args:
      folder: of the train unit.
      name: of the train unit, such as "topk".
      first_step: the step training starts or goes on at; what a killed run wrote after it does not count.

    Raises:
      UserError: a library is not installed.
    """
    made: list[Writer] = []
    if is_first_process():
        if config.tensorboard:
            made.append(TensorBoard(folder / "tensorboard", first_step))
        if config.wandb:
            made.append(Wandb(config, folder, name))
    return made


class TensorBoard:
    """Event files, by tensorboardX: look at them with ``tensorboard --logdir``.

    Args:
      folder: where to; each member of a stack has a folder of its name there.
      first_step: events of a killed run after it are hidden.
    """

    def __init__(self, folder: Path, first_step: int):
        self._make = _library("tensorboardX", "--train.tensorboard", "tensorboard").SummaryWriter
        self._folder, self._first_step = folder, first_step
        self._members: dict[str, Any] = {}

    def write(self, step: int, member: str, metrics: Mapping[str, float]) -> None:
        """Adds a scalar for each metric."""
        if member not in self._members:
            purge = self._first_step + 1 if self._first_step else None
            self._members[member] = self._make(
                str(self._folder / member), purge_step=purge, filename_suffix=f".{self._first_step}"
            )
        for name, value in metrics.items():
            self._members[member].add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for writer in self._members.values():
            writer.close()


class Wandb:
    """A run of Weights & Biases; offline with WANDB_MODE=offline in the environment.

    An interrupted run goes on in the same run of wandb.

    Args:
      config: ``config.wandb`` is the project, or "entity/project".
      folder: of the train unit; wandb writes to ``wandb/`` in the workdir, because its files change after the run.
      name: of the train unit.
    """

    def __init__(self, config: TrainConfig, folder: Path, name: str):
        library = _library("wandb", "--train.wandb", "wandb")
        entity, _, project = config.wandb.rpartition("/")
        self._run = library.init(
            project=project,
            entity=entity or None,
            name=name,
            id=fingerprint(dict(folder=str(folder.absolute()), started=(folder / "started.json").read_text())),
            resume="allow",
            dir=str(folder.parents[1]),
            config=to_json(config),
            settings=library.Settings(silent=True),
        )

    def write(self, step: int, member: str, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a member under the step."""
        prefix = f"{member}/" if member else ""
        self._run.log({f"{prefix}{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def _library(name: str, flag: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{flag} takes the package {name}, which cannot be imported ({error}): pip install 'saejax[{extra}]', or "
            "leave the flag out"
        ) from None

"""Splitting of a unit's items over the processes of a run: a fixed part each, and a barrier at the end."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from saejax.parallel.processes import Processes

T = TypeVar("T")


class ShareDone(BaseException):
    """End of a stage in a process whose part of the items is done: the first process does the rest."""


@dataclasses.dataclass(frozen=True)
class ProcessShare:
    """This process's part of a unit.

    Attributes:
      processes: all that work on the unit; None: this one alone.
    """

    processes: Processes | None = None

    @property
    def leads(self) -> bool:
        """True if this process does the work that is done only once."""
        return self.processes is None or self.processes.rank == 0

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that this process works on."""
        return items if self.processes is None else items[self.processes.rank :: self.processes.count]

    def join(self, files: Sequence[Path], last: bool = True) -> None:
        """Wait until all items are done.

        Args:
          files: files of the items, which exist afterwards.
          last: whether the first process alone continues.

        Raises:
          ShareDone: this is not the first one.
        """
        if self.processes is None:
            return
        self.processes.barrier("items are done")
        if last and not self.leads:
            raise ShareDone
        self.processes.wait_until_visible(files)

"""How the work of a stage is dealt out to the processes of a run.

A stage says of its items only what they are, which file is there when one is done, and how one is made (``Run.each``).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from saejax.parallel.parent import seen
from saejax.parallel.peers import Peers

T = TypeVar("T")


class Left(BaseException):
    """Ends a stage in a process whose share of it is done: the first of its team does the rest."""


class Team:
    """The processes that do a unit.

    Args:
      peers: all of the run; None: there is one process.
      unit: such as "train/topk".
      processes: those of the team, of which the first leads it.

    Attributes:
      leads: whether this process does what is done once.
      speaks: whether it says lines: the first one does, and any other of an item that it works on.
    """

    def __init__(self, peers: Peers | None = None, unit: str = "", processes: Sequence[int] = (0,)):
        self._peers, self._unit, self.size = peers, unit, len(processes)
        self._processes, self._shares = processes, 0
        self.leads = self.speaks = peers is None or peers.own == processes[0]

    def take(self, items: Sequence[T]) -> Iterator[T]:
        """The items that this process works on."""
        if self._peers is None or self.size == 1:
            yield from items
            return
        self._shares += 1
        for item in self._peers.take(f"{self._unit}/{self._shares}", items):
            self.speaks = True
            yield item
            self.speaks = self.leads

    def meet(self, place: str) -> None:
        """Waits until all processes of the team are at a place of the unit."""
        if self._peers and self.size > 1:
            self._peers.meet(f"{self._unit}: {place}", self._processes)

    def join(self, files: Sequence[Path], last: bool = True) -> None:
        """Waits until all items are done, whose files are then there.

        Args:
          files: of the items.
          last: whether the first process alone goes on.

        Raises:
          Left: this is not the first one.
        """
        self.meet("items are done")
        if last and not self.leads:
            raise Left
        if self.size > 1:
            seen(files)


def deal(peers: Peers, stage: str, units: Sequence[str]) -> Iterator[tuple[str, Team]]:
    """The units that this process works on, and with whom.

    Where there are as many units as processes, each does whole ones, whoever is free the next; where there are fewer,
    each unit has its team.
    """
    if not units:
        return
    if len(units) >= peers.count:
        for unit in peers.take(f"units of {stage}", units):
            yield unit, Team(peers, unit, [peers.own])
    else:
        number = peers.own % len(units)
        yield units[number], Team(peers, units[number], range(number, peers.count, len(units)))

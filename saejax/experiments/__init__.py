"""The binaries: ``python -m saejax.experiments.train --help``, or ``saejax-train --help``."""

from collections.abc import Callable

from saejax import command
from saejax.stages import STAGES


def binary(*stages: str, about: str = "") -> Callable[[], None]:
    """The program that runs some stages; it ends with the exit status that ``saejax.command`` lists.

    Args:
      stages: names of the stages, in the order in which they run.
      about: what it does, for ``--help``; default what its stages do.
    """
    about = about or f"{stages[0]}: {'; '.join(STAGES[stage].summary for stage in stages)}."
    return lambda: command.main(stages, about)

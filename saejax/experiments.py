"""The binaries: ``saejax-train --help``, or from the repository's root ``python -m experiments.train --help``."""

from collections.abc import Callable

from saejax import command
from saejax.registry import STAGES


def binary(*stages: str, about: str = "") -> Callable[[], None]:
    """The program that runs some stages; it ends with the exit status that ``saejax.command`` lists.

    Args:
      stages: names of the stages, in the order in which they run.
      about: what it does, for ``--help``; default what its stages do.
    """
    about = about or f"{stages[0]}: {'; '.join(STAGES[stage].summary for stage in stages)}."
    return lambda: command.main(stages, about)


preflight = binary("preflight")
baseline = binary("baseline", "benchmark")
capture = binary("capture")
train = binary("train")
evaluate = binary("evaluate")
ablate = binary("ablate")
patch = binary("patch")
probe = binary("probe")
study = binary("study")
attribute = binary("attribute")
export = binary("export")
ground_truth = binary("ground_truth")
interpret = binary("interpret")
explain = binary("explain")
atlas = binary("atlas")
report = binary("report")
pipeline = binary(*STAGES, about="pipeline: runs every stage; what is finished and unchanged is not run again.")

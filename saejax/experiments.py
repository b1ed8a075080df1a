"""The binaries: ``saejax-train --help``, or from the repository's root ``python -m experiments.train --help``."""

from collections.abc import Callable

from saejax.runner import command
from saejax.runner.registry import all_stages


def binary(*stages: str, about: str = "") -> Callable[[], None]:
    """Return the program that runs some stages; it ends with an exit status that ``saejax.runner.command`` lists.

    Args:
      stages: names of the stages, in the order in which they run.
      about: what it does, for ``--help``; default what its stages do.
    """
    about = about or f"{stages[0]}: {'; '.join(all_stages()[stage].summary for stage in stages)}."
    return lambda: command.main(stages, about)


preflight = binary("preflight")
baseline = binary("baseline", "benchmark")
tokenize = binary("tokenize")
capture = binary("capture")
train = binary("train")
evaluate = binary("evaluate")
ablate = binary("ablate")
patch = binary("patch")
probe = binary("probe")
steer = binary("steer")
study = binary("study")
attribute = binary("attribute")
circuits = binary("circuits")
export = binary("export")
ground_truth = binary("ground_truth")
known_circuits = binary("known_circuits")
algorithm = binary("algorithm")
interpret = binary("interpret")
explain = binary("explain")
atlas = binary("atlas")
transfer = binary("transfer")
cluster = binary("cluster")
track = binary("track")
report = binary("report")
pipeline = binary(*all_stages(), about="pipeline: runs every stage; what is finished and unchanged is not run again.")


def study_run() -> None:
    """Run the pipeline on several models, and write one report of them all."""
    from saejax.studies.run import main

    main()


def serve() -> None:
    """Serve the graphs of a folder as interactive pages."""
    from saejax.serving.run import main

    main()

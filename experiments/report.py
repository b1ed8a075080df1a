"""The report stage as a binary: ``python -m experiments.report --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["report"], f"report: {STAGES['report'].summary}.")

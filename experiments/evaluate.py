"""The evaluate stage as a binary: ``python -m experiments.evaluate --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["evaluate"], f"evaluate: {STAGES['evaluate'].summary}.")

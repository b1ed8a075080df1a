"""The study stage as a binary: ``python -m experiments.study --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["study"], f"study: {STAGES['study'].summary}.")

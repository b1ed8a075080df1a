"""The train stage as a binary: ``python -m experiments.train --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["train"], f"train: {STAGES['train'].summary}.")

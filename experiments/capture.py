"""The capture stage as a binary: ``python -m experiments.capture --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["capture"], f"capture: {STAGES['capture'].summary}.")

"""The probe stage as a binary: ``python -m experiments.probe --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["probe"], f"probe: {STAGES['probe'].summary}.")

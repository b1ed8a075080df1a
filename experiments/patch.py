"""The patch stage as a binary: ``python -m experiments.patch --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["patch"], f"patch: {STAGES['patch'].summary}.")

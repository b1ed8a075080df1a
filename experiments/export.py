"""The export stage as a binary: ``python -m experiments.export --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["export"], f"export: {STAGES['export'].summary}.")

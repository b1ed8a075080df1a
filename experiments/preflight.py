"""The preflight stage as a binary: ``python -m experiments.preflight --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["preflight"], f"preflight: {STAGES['preflight'].summary}.")

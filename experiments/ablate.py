"""The ablate stage as a binary: ``python -m experiments.ablate --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["ablate"], f"ablate: {STAGES['ablate'].summary}.")

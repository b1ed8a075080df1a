"""The attribute stage as a binary: ``python -m experiments.attribute --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(["attribute"], f"attribute: {STAGES['attribute'].summary}.")

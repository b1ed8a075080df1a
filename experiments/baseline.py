"""The baseline stage as a binary: ``python -m experiments.baseline --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["baseline"], f"baseline: {pipeline.STAGES['baseline'].summary}.")

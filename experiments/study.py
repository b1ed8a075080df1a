"""The study stage as a binary: ``python -m experiments.study --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["study"], f"study: {pipeline.STAGES['study'].summary}.")

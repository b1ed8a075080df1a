"""The train stage as a binary: ``python -m experiments.train --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["train"], f"train: {pipeline.STAGES['train'].summary}.")

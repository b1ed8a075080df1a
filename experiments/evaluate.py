"""The evaluate stage as a binary: ``python -m experiments.evaluate --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["evaluate"], f"evaluate: {pipeline.STAGES['evaluate'].summary}.")

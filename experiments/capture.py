"""The capture stage as a binary: ``python -m experiments.capture --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["capture"], f"capture: {pipeline.STAGES['capture'].summary}.")

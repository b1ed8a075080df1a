"""The probe stage as a binary: ``python -m experiments.probe --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["probe"], f"probe: {pipeline.STAGES['probe'].summary}.")

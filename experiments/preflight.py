"""The preflight stage as a binary: ``python -m experiments.preflight --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["preflight"], f"preflight: {pipeline.STAGES['preflight'].summary}.")

"""The export stage as a binary: ``python -m experiments.export --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["export"], f"export: {pipeline.STAGES['export'].summary}.")

"""The report stage as a binary: ``python -m experiments.report --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["report"], f"report: {pipeline.STAGES['report'].summary}.")

"""The attribute stage as a binary: ``python -m experiments.attribute --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["attribute"], f"attribute: {pipeline.STAGES['attribute'].summary}.")

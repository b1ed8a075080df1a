"""The patch stage as a binary: ``python -m experiments.patch --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["patch"], f"patch: {pipeline.STAGES['patch'].summary}.")

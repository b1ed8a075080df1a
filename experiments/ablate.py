"""The ablate stage as a binary: ``python -m experiments.ablate --help``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(["ablate"], f"ablate: {pipeline.STAGES['ablate'].summary}.")

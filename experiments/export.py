"""``python -m experiments.export --help``."""

from saejax.experiments import export

if __name__ == "__main__":
    export()

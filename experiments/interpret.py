"""``python -m experiments.interpret --help``."""

from saejax.experiments import interpret

if __name__ == "__main__":
    interpret()

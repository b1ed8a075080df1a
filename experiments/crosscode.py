"""``python -m experiments.crosscode --help``."""

from saejax.experiments import crosscode

if __name__ == "__main__":
    crosscode()

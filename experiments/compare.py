"""``python -m experiments.compare --help``."""

from saejax.experiments import compare

if __name__ == "__main__":
    compare()

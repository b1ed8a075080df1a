"""``python -m experiments.baseline --help``."""

from saejax.experiments import baseline

if __name__ == "__main__":
    baseline()

"""``python -m experiments.pipeline --help``."""

from saejax.experiments import pipeline

if __name__ == "__main__":
    pipeline()

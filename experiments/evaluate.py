"""``python -m experiments.evaluate --help``."""

from saejax.experiments import evaluate

if __name__ == "__main__":
    evaluate()

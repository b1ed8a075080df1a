"""``python -m experiments.ground_truth --help``."""

from saejax.experiments import ground_truth

if __name__ == "__main__":
    ground_truth()

"""``python -m experiments.algorithm --help``."""

from saejax.experiments import algorithm

if __name__ == "__main__":
    algorithm()

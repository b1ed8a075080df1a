"""``python -m experiments.study --help``."""

from saejax.experiments import study

if __name__ == "__main__":
    study()

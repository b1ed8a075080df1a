"""``python -m experiments.attribute --help``."""

from saejax.experiments import attribute

if __name__ == "__main__":
    attribute()

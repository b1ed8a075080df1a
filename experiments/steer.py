"""``python -m experiments.steer --help``."""

from saejax.experiments import steer

if __name__ == "__main__":
    steer()

"""``python -m experiments.capture --help``."""

from saejax.experiments import capture

if __name__ == "__main__":
    capture()

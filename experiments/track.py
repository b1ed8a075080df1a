"""``python -m experiments.track --help``."""

from saejax.experiments import track

if __name__ == "__main__":
    track()

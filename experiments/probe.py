"""``python -m experiments.probe --help``."""

from saejax.experiments import probe

if __name__ == "__main__":
    probe()

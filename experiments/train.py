"""``python -m experiments.train --help``."""

from saejax.experiments import train

if __name__ == "__main__":
    train()

"""``python -m experiments.transfer --help``."""

from saejax.experiments import transfer

if __name__ == "__main__":
    transfer()

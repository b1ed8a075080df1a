"""``python -m experiments.patch --help``."""

from saejax.experiments import patch

if __name__ == "__main__":
    patch()

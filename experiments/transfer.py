"""``python -m experiments.transfer --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("transfer")

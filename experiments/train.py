"""``python -m experiments.train --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("train")

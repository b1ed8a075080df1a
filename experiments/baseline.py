"""``python -m experiments.baseline --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("baseline")

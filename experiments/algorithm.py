"""``python -m experiments.algorithm --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("algorithm")

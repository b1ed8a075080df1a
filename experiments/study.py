"""``python -m experiments.study --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("study")

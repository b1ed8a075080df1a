"""``python -m experiments.runs --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("runs")

"""``python -m experiments.report --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("report")

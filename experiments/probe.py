"""``python -m experiments.probe --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("probe")

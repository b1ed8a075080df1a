"""``python -m experiments.evaluate --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("evaluate")

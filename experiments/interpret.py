"""``python -m experiments.interpret --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("interpret")

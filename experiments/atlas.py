"""``python -m experiments.atlas --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("atlas")

"""``python -m experiments.pipeline --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("pipeline")

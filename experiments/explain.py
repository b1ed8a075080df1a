"""``python -m experiments.explain --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("explain")

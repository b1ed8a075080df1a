"""``python -m experiments.tokenize --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("tokenize")

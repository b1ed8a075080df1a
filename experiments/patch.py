"""``python -m experiments.patch --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("patch")

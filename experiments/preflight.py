"""``python -m experiments.preflight --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("preflight")

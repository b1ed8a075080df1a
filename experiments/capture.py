"""``python -m experiments.capture --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("capture")

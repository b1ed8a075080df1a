"""``python -m experiments.steer --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("steer")

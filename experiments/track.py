"""``python -m experiments.track --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("track")

"""``python -m experiments.attribute --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("attribute")

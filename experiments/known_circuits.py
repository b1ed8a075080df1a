"""``python -m experiments.known_circuits --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("known_circuits")

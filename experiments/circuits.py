"""``python -m experiments.circuits --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("circuits")

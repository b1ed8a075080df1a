"""``python -m experiments.ablate --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("ablate")

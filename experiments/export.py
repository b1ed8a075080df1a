"""``python -m experiments.export --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("export")

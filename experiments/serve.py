"""``python -m experiments.serve --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("serve")

"""``python -m experiments.cluster --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("cluster")

"""``python -m experiments.ground_truth --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("ground_truth")

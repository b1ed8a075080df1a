"""``python -m experiments.atlas --help``."""

from saejax.experiments import atlas

if __name__ == "__main__":
    atlas()

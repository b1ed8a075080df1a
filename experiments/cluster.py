"""``python -m experiments.cluster --help``."""

from saejax.experiments import cluster

if __name__ == "__main__":
    cluster()

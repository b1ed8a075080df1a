"""``python -m experiments.preflight --help``."""

from saejax.experiments import preflight

if __name__ == "__main__":
    preflight()

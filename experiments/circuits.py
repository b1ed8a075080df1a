"""``python -m experiments.circuits --help``."""

from saejax.experiments import circuits

if __name__ == "__main__":
    circuits()

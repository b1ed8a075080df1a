"""``python -m experiments.known_circuits --help``."""

from saejax.experiments import known_circuits

if __name__ == "__main__":
    known_circuits()

"""``python -m experiments.ablate --help``."""

from saejax.experiments import ablate

if __name__ == "__main__":
    ablate()

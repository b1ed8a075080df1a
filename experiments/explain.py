"""``python -m experiments.explain --help``."""

from saejax.experiments import explain

if __name__ == "__main__":
    explain()

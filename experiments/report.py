"""``python -m experiments.report --help``."""

from saejax.experiments import report

if __name__ == "__main__":
    report()

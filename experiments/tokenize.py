"""``python -m experiments.tokenize --help``."""

from saejax.experiments import tokenize

if __name__ == "__main__":
    tokenize()

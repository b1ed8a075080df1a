"""``python -m experiments.serve --help``."""

from saejax.experiments import serve

if __name__ == "__main__":
    serve()

"""``python -m experiments.evaluate --help``: see ``saejax.experiments.evaluate``."""

from saejax.experiments.evaluate import main

if __name__ == "__main__":
    main()

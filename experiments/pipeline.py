"""``python -m experiments.pipeline --help``: see ``saejax.experiments.pipeline``."""

from saejax.experiments.pipeline import main

if __name__ == "__main__":
    main()

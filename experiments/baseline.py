"""``python -m experiments.baseline --help``: see ``saejax.experiments.baseline``."""

from saejax.experiments.baseline import main

if __name__ == "__main__":
    main()

"""``python -m experiments.study --help``: see ``saejax.experiments.study``."""

from saejax.experiments.study import main

if __name__ == "__main__":
    main()

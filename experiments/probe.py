"""``python -m experiments.probe --help``: see ``saejax.experiments.probe``."""

from saejax.experiments.probe import main

if __name__ == "__main__":
    main()

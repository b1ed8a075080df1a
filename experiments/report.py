"""``python -m experiments.report --help``: see ``saejax.experiments.report``."""

from saejax.experiments.report import main

if __name__ == "__main__":
    main()

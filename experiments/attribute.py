"""``python -m experiments.attribute --help``: see ``saejax.experiments.attribute``."""

from saejax.experiments.attribute import main

if __name__ == "__main__":
    main()

"""``python -m experiments.train --help``: see ``saejax.experiments.train``."""

from saejax.experiments.train import main

if __name__ == "__main__":
    main()

"""``python -m experiments.atlas --help``: see ``saejax.experiments.atlas``."""

from saejax.experiments.atlas import main

if __name__ == "__main__":
    main()

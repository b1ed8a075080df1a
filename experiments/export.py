"""``python -m experiments.export --help``: see ``saejax.experiments.export``."""

from saejax.experiments.export import main

if __name__ == "__main__":
    main()

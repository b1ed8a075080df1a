"""``python -m experiments.patch --help``: see ``saejax.experiments.patch``."""

from saejax.experiments.patch import main

if __name__ == "__main__":
    main()

"""``python -m experiments.ablate --help``: see ``saejax.experiments.ablate``."""

from saejax.experiments.ablate import main

if __name__ == "__main__":
    main()

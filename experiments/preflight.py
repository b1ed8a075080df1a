"""``python -m experiments.preflight --help``: see ``saejax.experiments.preflight``."""

from saejax.experiments.preflight import main

if __name__ == "__main__":
    main()

"""``python -m experiments.interpret --help``: see ``saejax.experiments.interpret``."""

from saejax.experiments.interpret import main

if __name__ == "__main__":
    main()

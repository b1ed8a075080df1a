"""``python -m experiments.capture --help``: see ``saejax.experiments.capture``."""

from saejax.experiments.capture import main

if __name__ == "__main__":
    main()

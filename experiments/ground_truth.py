"""``python -m experiments.ground_truth --help``: see ``saejax.experiments.ground_truth``."""

from saejax.experiments.ground_truth import main

if __name__ == "__main__":
    main()

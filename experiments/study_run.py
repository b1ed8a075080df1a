"""``python -m experiments.study_run --help``."""

from saejax.cli import main

if __name__ == "__main__":
    main("study_run")

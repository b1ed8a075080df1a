"""``python -m experiments.study_run --help``."""

from saejax.experiments import study_run

if __name__ == "__main__":
    study_run()

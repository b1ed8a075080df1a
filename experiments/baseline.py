"""Behaviours and benchmarks before anything is explained: ``python -m experiments.baseline --help``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    stages = ["baseline", "benchmark"]
    command.main(stages, "baseline: " + "; ".join(STAGES[stage].summary for stage in stages) + ".")

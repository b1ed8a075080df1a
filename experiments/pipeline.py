"""Every stage in order: ``python -m experiments.pipeline --workdir=runs/demo --flagfile=configs/demo.flags``."""

from saejax import command
from saejax.stages import STAGES

if __name__ == "__main__":
    command.main(list(STAGES), "pipeline: runs every stage in order; what is finished and unchanged is not run again.")

"""Every stage in order: ``python -m experiments.pipeline --workdir=runs/demo --flagfile=configs/demo.flags``."""

from saejax import command, pipeline

if __name__ == "__main__":
    command.main(
        list(pipeline.STAGES), "pipeline: runs every stage in order; what is finished and unchanged is not run again."
    )

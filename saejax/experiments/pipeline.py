"""Every stage in order, as a program."""

from saejax.experiments import binary
from saejax.stages import STAGES

main = binary(*STAGES, about="pipeline: runs every stage in order; what is finished and unchanged is not run again.")

if __name__ == "__main__":
    main()

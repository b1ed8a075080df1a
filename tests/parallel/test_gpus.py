"""How the processes of a node share its GPUs, from what SLURM and Open MPI tell them."""

import pytest

from saejax.errors import UserError
from saejax.parallel.cluster import gpus_of_process

STEP = dict(SLURM_STEP_NODELIST="n[0-3]", SLURM_NODEID="0")


def step(local: int, tasks: str, **more: str) -> dict[str, str]:
    """What SLURM tells the process of this number on its node."""
    return STEP | dict(SLURM_LOCALID=str(local), SLURM_STEP_TASKS_PER_NODE=tasks) | more


@pytest.mark.parametrize(
    ("environment", "gpus", "own"),
    [
        ({}, 8, None),  # no launcher: JAX takes all
        (step(0, "1(x4)"), 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # one process a node
        (step(0, "1(x4)"), 0, None),  # no GPUs
        (step(3, "8(x4)"), 8, [3]),
        (step(1, "2(x3),1"), 8, [4, 5, 6, 7]),
        (step(0, "2(x3),1", SLURM_NODEID="3"), 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (step(2, "8", CUDA_VISIBLE_DEVICES="5", SLURM_GPUS_ON_NODE="8"), 8, [0]),  # SLURM dealt them out
        (step(1, "2", CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_GPUS_ON_NODE="4"), 8, [2, 3]),
        (dict(OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="4"), 4, [1]),
    ],
)
def test_processes_of_a_node_share_all_of_its_gpus(environment, gpus, own):
    assert gpus_of_process(environment, gpus) == own


def test_gpus_that_cannot_be_shared_equally_are_refused():
    with pytest.raises(UserError, match="3 processes cannot share the 8 GPUs of their node equally"):
        gpus_of_process(step(0, "3"), 8)

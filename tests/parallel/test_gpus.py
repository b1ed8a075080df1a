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
        (step(2, "8", CUDA_VISIBLE_DEVICES="5", SLURM_GPUS_ON_NODE="8"), 8, [0]),  # SLURM dealt them out
        (step(1, "2", CUDA_VISIBLE_DEVICES="4,6", SLURM_GPUS_ON_NODE="2"), 8, [1]),
        (dict(OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="4"), 4, [1]),
        # mpirun in a SLURM job has the variables of the job's own process
        (step(0, "1", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="4"), 4, [1]),
        (dict(SLURM_LOCALID="0", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="4"), 4, [1]),
    ],
)
def test_processes_of_a_node_share_all_of_its_gpus(environment, gpus, own):
    assert gpus_of_process(environment, gpus) == own


@pytest.mark.parametrize("tasks", ["3", "2(x3),1"])
def test_gpus_that_are_not_as_many_as_processes_are_refused(tasks):
    with pytest.raises(UserError, match="processes cannot share the 8 GPUs of their node: start one a node"):
        gpus_of_process(step(0, tasks), 8)

"""How the processes of a node share its GPUs, and processes that do not have the devices that they should have."""

from types import SimpleNamespace

import pytest

from saejax.errors import UserError
from saejax.parallel import gpus as node_gpus
from saejax.parallel.cluster import check_devices, gpus_of_process
from saejax.parallel.gpus import count_visible, visible_gpus


def step(local: int, tasks: str, **more: str) -> dict[str, str]:
    """What SLURM tells the process of this number on its node."""
    variables = dict(SLURM_STEP_NODELIST="n[0-3]", SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE=tasks)
    return variables | dict(SLURM_LOCALID=str(local)) | more


@pytest.mark.parametrize(
    ("environment", "gpus", "numbers"),
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
def test_processes_of_a_node_share_all_of_its_gpus(environment, gpus, numbers):
    assert gpus_of_process(environment, gpus) == numbers


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        *[(None, 8), ("", 0), ("-1", 0), ("0,-1,1", 1), ("5,2", 2), ("GPU-8932f937,GPU-46f2", 2), ("9", 0)],
        *[("0,9,1", 1), ("0, 1", 2), ("none", 0), ("NoDevFiles", 0), ("3,1,3", 0), ("GPU-46f2,GPU-46f2", 0)],
        *[("MIG-1", 1), ("MIG-1,MIG-2", 1), ("GPU-46f2, ,1", 1)],
    ],
)
def test_gpus_are_counted_as_cuda_does(monkeypatch, visible, count):
    monkeypatch.setattr(node_gpus, "find_ids", list)  # without nvidia-smi
    assert count_visible({} if visible is None else dict(CUDA_VISIBLE_DEVICES=visible), 8) == count


IDS = ("GPU-46f2aa01", "GPU-46f2bb02", "GPU-8932f937")
LISTED = "".join(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: {name})\n" for number, name in enumerate(IDS))
LISTED += "  MIG 1g.10gb     Device  0: (UUID: MIG-c6d4f1ef)\n"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        *[("GPU-46f2aa,GPU-8932f937", [IDS[0], IDS[2]]), ("GPU-00000000", []), ("GPU-8932f937,GPU-0,1", [IDS[2]])],
        *[("GPU-8932,GPU-8932f937", []), ("2,GPU-8932f937", []), ("GPU-46f2aa,1,0", [])],  # one GPU twice
        ("1,GPU-8932f937", ["1", IDS[2]]),
        ("GPU-46f2", []),  # either of two
        *[("MIG-c6d4f1ef", ["MIG-c6d4f1ef"]), ("MIG-00000000", [])],
        *[("MIG-GPU-8932f937/7/0", ["MIG-GPU-8932f937/7/0"]), ("MIG-GPU-0/7/0", [])],
    ],
)
def test_ids_name_gpus_of_the_node(monkeypatch, tmp_path, visible, names):
    """As the CUDA programming guide describes CUDA_VISIBLE_DEVICES."""
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\nprintf '{LISTED}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert visible_gpus(dict(CUDA_VISIBLE_DEVICES=visible), 3) == names
    assert count_visible(dict(CUDA_VISIBLE_DEVICES=visible), 3) == len(names)


def test_gpus_that_are_not_as_many_as_processes_are_refused():
    for tasks in ("3", "2(x3),1"):
        with pytest.raises(UserError, match="processes cannot share the 8 GPUs of their node: start one a node"):
            gpus_of_process(step(0, tasks), 8)


def devices(*counts, platform="gpu"):
    """So many devices in each process."""
    places = [process for process, count in enumerate(counts) for _ in range(count)]
    return [SimpleNamespace(process_index=process, platform=platform) for process in places]


def test_processes_have_equally_many_devices_and_all_their_gpus():
    check_devices(devices(8, 8), 1, range(8))
    check_devices(devices(4, 4, platform="tpu"), 0, None)
    check_devices(devices(1, 1, platform="cpu"), 0, None)
    for found, gpus, message in (
        (devices(4, 4), range(8), "has 8 GPUs, of which JAX uses 4: install"),
        (devices(1, 1, platform="cpu"), [0], "has 1 GPUs, of which JAX uses 0"),  # JAX took the processor
        (devices(8, 7, 8), range(8), r"\(process 0 has 8, process 1 has 7, process 2 has 8\)"),
    ):
        with pytest.raises(UserError, match=message):
            check_devices(found, 0, gpus)

"""Several processes of one run: how they find one another, and what each makes of the devices of its node.

Under SLURM, under Open MPI's ``mpirun`` and on the hosts of a TPU slice, ``--mesh.distributed=auto`` finds out which
processes there are. Elsewhere each is told by ``--mesh.processes``, ``process_id`` and ``coordinator``.
"""

import dataclasses
import glob
import os
from collections.abc import Mapping

from saejax.errors import UserError
from saejax.settings import MeshConfig

HEARTBEAT = 50  # seconds without a word after which a process counts as dead, and the others end


def join(config: MeshConfig) -> MeshConfig:
    """Joins this process to the others of its run, before JAX looks for devices.

    Returns:
      The settings with the number of processes and which one this is.

    Raises:
      UserError: no cluster can be found, or the processes of a node cannot share its GPUs.
    """
    if config.distributed == "flags" and config.processes == 1:
        return config
    import jax

    coordinator = config.coordinator or None
    if config.distributed == "flags":
        told = dict(num_processes=config.processes, process_id=config.process_id)
        jax.distributed.initialize(coordinator, **told, heartbeat_timeout_seconds=HEARTBEAT)
        return config
    if not jax.distributed.is_initialized():
        ids = gpus_of_process(os.environ, len(glob.glob("/dev/nvidia[0-9]*")))
        try:
            jax.distributed.initialize(coordinator, local_device_ids=ids, heartbeat_timeout_seconds=HEARTBEAT)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                "--mesh.distributed=auto found neither SLURM, Open MPI nor a TPU slice of several hosts "
                f"({error}): start the run by srun or mpirun, or name --mesh.processes, process_id and coordinator"
            ) from error
    return dataclasses.replace(config, processes=jax.process_count(), process_id=jax.process_index())


def gpus_of_process(environment: Mapping[str, str], gpus: int) -> list[int] | None:
    """Which of the GPUs that a process sees are its own.

    JAX by itself gives one GPU to each process that SLURM or Open MPI starts, and leaves the others of a node idle
    where it starts one a node. Here the processes of a node share all of them equally.

    Args:
      environment: variables of SLURM and Open MPI, and CUDA_VISIBLE_DEVICES.
      gpus: of the node, as far as the process can see.

    Returns:
      Their numbers among the visible ones; None where there is no GPU or no such launcher.

    Raises:
      UserError: they cannot be shared equally.
    """
    place = _place(environment)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = gpus if visible is None else len([device for device in visible.split(",") if device.strip()])
    if place is None or not seen:
        return None
    local, here = place
    if seen < int(environment.get("SLURM_GPUS_ON_NODE") or 0):  # SLURM has dealt them out already
        return list(range(seen))
    if seen % here:
        raise UserError(
            f"{here} processes cannot share the {seen} GPUs of their node equally: start one a node, or one a GPU"
        )
    share = seen // here
    return list(range(local * share, (local + 1) * share))


def _place(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Which process of its node this is, and of how many; None outside of SLURM's and Open MPI's steps."""
    if "SLURM_STEP_NODELIST" in environment and "SLURM_LOCALID" in environment:
        # "2(x3),1" is two processes on each of three nodes, then one
        counts: list[int] = []
        for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
            count, _, times = part.partition("(x")
            counts += [int(count)] * int(times.rstrip(")") or 1)
        return int(environment["SLURM_LOCALID"]), counts[
            min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)
        ]
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]), int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
    return None

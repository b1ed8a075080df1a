"""Several processes of one run: how they find one another, and what each makes of the devices of its node.

Under SLURM, under Open MPI's ``mpirun`` and on the hosts of a TPU slice, ``--mesh.distributed=auto`` finds out which
processes there are. Elsewhere ``--mesh.processes``, ``process_id`` and ``coordinator`` say it.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from orbax.checkpoint import multihost

from saejax.errors import Interrupted, UserError
from saejax.parallel.gpus import count_gpus, count_visible
from saejax.parallel.processes import Processes
from saejax.parallel.settings import MeshConfig
from saejax.parallel.stopping import StopAgreement

HEARTBEAT = 30  # seconds without a sign of life after which JAX gives a process up and ends the others
_COME = 300  # seconds that processes wait for one another at the start
_SHUTDOWN = 50  # seconds that a process which is done waits for the others
_LOOK_EVERY = 0.1  # seconds
_joined: list[Processes] = []  # the processes of this one's run, once it has joined them
_agreement: list[StopAgreement] = []  # of these processes, where there are several


def join(config: MeshConfig, say: Callable[[str], None], stopping: Callable[[], bool] = lambda: False) -> MeshConfig:
    """Join this process to the others of its run, before JAX looks for devices.

    Args:
      config: number of processes, number of this one and address of the first, unless the cluster gives them.
      say: prints a line.
      stopping: whether this process was asked to stop; it then no longer waits for the others.

    Returns:
      The settings with the number of processes and the number of this one.

    Raises:
      UserError: no cluster or no first process can be found, or the processes of a node cannot share its GPUs.
      Interrupted: asked to stop.
    """
    # Its handler of SIGTERM would replace Python's, so that a run of one process would not hear of the signal.
    jax.config.update("jax_enable_preemption_service", False)
    gpus = count_gpus()
    ids: list[int] | None
    if config.distributed == "flags":
        try:
            _initialize(config, stopping, num_processes=config.processes, process_id=config.process_id)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"process {config.process_id} of {config.processes} finds no others by "
                f"--mesh.coordinator={config.coordinator} ({error}): name HOST:PORT of process 0 in every process"
            ) from error
        ids = list(range(count_visible(os.environ, gpus)))
        if (named := os.environ.get("JAX_CUDA_VISIBLE_DEVICES", "all")) != "all":  # for JAX alone
            ids = [int(number) for number in named.split(",")]
    else:
        ids = gpus_of_process(os.environ, gpus)
        try:
            _initialize(config, stopping, local_device_ids=ids)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                "--mesh.distributed=auto found neither SLURM, Open MPI nor a TPU slice of several hosts "
                f"({error}): start the run by srun or mpirun, or name --mesh.processes, process_id and coordinator"
            ) from error
    rank, count = jax.process_index(), jax.process_count()
    _joined[:] = [Processes(multihost.get_jax_distributed_client(), rank, count, say)]
    _agreement[:] = [StopAgreement(processes) for processes in _joined if count > 1]
    check_devices(jax.devices(), rank, None if jax.config.jax_platforms == "cpu" else ids)
    return dataclasses.replace(config, processes=count, process_id=rank)


def _initialize(config: MeshConfig, stopping: Callable[[], bool], **which: Any) -> None:
    """Call ``jax.distributed.initialize``, which waits for the other processes, in a thread, and wait with it."""
    limits = dict(initialization_timeout=_COME, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=_SHUTDOWN)
    joining: concurrent.futures.Future[None] = concurrent.futures.Future()

    def initialize() -> None:
        try:
            joining.set_result(jax.distributed.initialize(config.coordinator or None, **which, **limits))
        except BaseException as error:
            joining.set_exception(error)

    threading.Thread(target=initialize, name="saejax-join", daemon=True).start()
    while concurrent.futures.wait([joining], _LOOK_EVERY).not_done:
        if stopping():
            raise Interrupted("stopped while waiting for other processes to start")
    joining.result()


def joined_processes() -> Processes | None:
    """Return the processes that this one has joined; None where it is alone."""
    return next((processes for processes in _joined if processes.count > 1), None)


def stop_agreement() -> StopAgreement:
    """Return the agreement of several processes on where to stop; an error where this one is alone."""
    (agreement,) = _agreement
    return agreement


def process_label() -> str:
    """Return what stands before this process's lines, such as "process 3 of 4: "; "" for one alone."""
    processes = joined_processes()
    return f"process {processes.rank} of {processes.count}: " if processes else ""


def check_same(processes: Processes, settings: Mapping[str, str]) -> None:
    """Refuse to go on unless this process was started as the first one was.

    Args:
      processes: the processes of the run.
      settings: values of this process, by the names of flags and packages.

    Raises:
      UserError: names what differs.
    """
    first = json.loads(processes.broadcast("settings", json.dumps(settings)))
    for name in sorted({*first, *settings}):
        expected, actual = (values.get(name, "nothing") for values in (first, settings))
        if expected != actual:
            raise UserError(
                f"{name} is {actual} in process {processes.rank} and {expected} in process 0: start all processes alike"
            )


def check_devices(devices: Sequence[jax.Device], rank: int, gpus: Sequence[int] | None) -> None:
    """Raise a ``UserError`` unless all processes have equally many devices, and this one all of its GPUs.

    JAX without its GPU package runs on the processor instead, where a run would take days longer.

    Args:
      devices: the devices of all processes.
      rank: number of this process.
      gpus: the GPUs of this process; None where there are none, or none are wanted.
    """
    used = sum(device.process_index == rank and device.platform != "cpu" for device in devices)
    if gpus is not None and used < len(gpus):
        raise UserError(
            f"this process has {len(gpus)} GPUs, of which JAX uses {used}: install the extra cuda12 or cuda13, see "
            "that no other program holds them, or set JAX_PLATFORMS=cpu"
        )
    count = collections.Counter(device.process_index for device in devices)
    if len(set(count.values())) > 1:
        counts = ", ".join(f"process {number} has {of_it}" for number, of_it in sorted(count.items()))
        raise UserError(f"processes have different numbers of devices ({counts}): start the run on equal nodes")


def gpus_of_process(environment: Mapping[str, str], gpus: int) -> list[int] | None:
    """Return which of the GPUs that a process sees are its own: all of its node's, or one.

    JAX by itself gives one GPU to each process that SLURM or Open MPI starts, and leaves the others of a node idle
    where it starts one a node.

    Args:
      environment: variables of SLURM and Open MPI, and CUDA_VISIBLE_DEVICES.
      gpus: the node's GPUs that the process can see.

    Returns:
      Their numbers among the visible ones; None where there is no GPU or no such launcher.

    Raises:
      UserError: the node has several processes, and not as many GPUs.
    """
    # Open MPI first, as in JAX: SLURM's variables may describe the step in which mpirun runs.
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        tasks, local = environment["OMPI_COMM_WORLD_LOCAL_SIZE"], environment["OMPI_COMM_WORLD_LOCAL_RANK"]
    else:
        # SLURM writes "2(x3),1" for two processes on each of three nodes, then one; nodes have to be equal.
        tasks, local = environment.get("SLURM_STEP_TASKS_PER_NODE", ""), environment.get("SLURM_LOCALID", "0")
    processes, visible = re.match(r"\d+", tasks), count_visible(environment, gpus)
    if processes is None or not visible:
        return None
    # SLURM may have assigned them already.
    if processes[0] == "1" or visible < int(environment.get("SLURM_GPUS_ON_NODE") or 0):
        return list(range(visible))
    if visible != int(processes[0]):
        raise UserError(
            f"{processes[0]} processes cannot share the {visible} GPUs of their node: start one a node, or one a GPU"
        )
    return [int(local)]

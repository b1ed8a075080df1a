"""Two workdirs compared: what a process made alone, and what several or killed ones did."""

import gc
import itertools
import json
import random
import time
from pathlib import Path

import jax
import numpy as np
import runs

from saejax.runner.workspace import current_units


def results(workdir):
    """The results of all units but those that time something, by their folders."""
    units = current_units(workdir).items()
    timed = ("preflight", "report", "train")
    return {u: json.loads((f / "done.json").read_text()) for u, f in units if u.partition("/")[0] not in timed}


#: Figures that say what machine a result was made on: speed, and filler of batches, which are cut to the devices.
OF_MACHINE = {"tokens_per_second"}


def assert_same(first, second, tolerance, place=""):
    """Two results with the same figures, within a tolerance of those that are as large as 1."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for name in first.keys() - OF_MACHINE:
            assert_same(first[name], second[name], tolerance, f"{place}.{name}")
    elif isinstance(first, list):
        assert len(first) == len(second), place
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, tolerance, f"{place}.{number}")
    elif isinstance(first, float) and isinstance(second, float):
        assert abs(first - second) <= tolerance * max(1.0, abs(first)), (place, first, second)
    else:
        assert first == second, place


def assert_as_one(alone, together):
    """Two workdirs with the same units, files and figures; the store is the same bits.

    What devices of several processes do together is rounded otherwise, and ablation's doses divide such figures by
    small differences; what is dealt out is the same to 1e-6.
    """
    assert_same_figures(alone, together, 1e-6, ablate=1e-4)
    assert runs.checksums(alone) == runs.checksums(together)


def assert_same_figures(first, second, tolerance, **of_stages):
    """Two workdirs with the same units, files and, within a tolerance that a stage may have of its own, figures."""
    units, others = results(first), results(second)
    assert units.keys() == others.keys()
    for unit in units:
        assert units[unit]["files"].keys() == others[unit]["files"].keys(), unit
        allowed = of_stages.get(unit.partition("/")[0], tolerance)
        assert_same(units[unit]["results"], others[unit]["results"], allowed, unit)


def kill_once(processes, moments: random.Random, lines: int) -> str:
    """Kill one of a run's processes within a second of a random line of the first one's output.

    Args:
      processes: all processes of the run.
      moments: random numbers.
      lines: how many lines the first process of a whole run prints.

    Returns:
      The line; "" where the run was done before the moment came.
    """
    # A line comes as late on a busy machine as what it tells of.
    *_, last = itertools.islice(processes[0].stdout, moments.randrange(1, lines))
    time.sleep(moments.random())
    if any(process.poll() is not None for process in processes):
        for process in processes:
            runs.finish(process)
        return ""
    moments.choice(processes).kill()
    for process in processes:
        process.communicate()  # JAX ends the others
    # Nothing but a stop that was saved asks for another start.
    assert not {process.returncode for process in processes} & {0, 2, 143}
    return last


def kill_at_random_moments(start, check, root, kills: int, lines: int) -> Path:
    """Kill a run so often, each time at a random moment (``kill_once``), then let it finish.

    ``start(folder)`` starts the run's processes, of which one is killed, ``check(folder)`` looks at what a run that has
    finished made, and ``lines`` is how many lines the first process of a whole run prints. Gives the run's folder.
    """
    moments, number, struck = random.Random(60 * kills), 0, []  # the first strikes a small run while it trains
    while len(struck) < kills:
        if last := kill_once(start(root / f"run{number}"), moments, lines):
            struck.append(last)
        else:  # the next kill strikes a fresh run
            check(root / f"run{number}")
            number += 1
    print("killed after:", *struck)
    for process in start(root / f"run{number}"):
        runs.finish(process)
    check(root / f"run{number}")
    return root / f"run{number}"


def live_bytes() -> np.ndarray:
    """The bytes of arrays on each device; several arrays of one buffer count once."""
    gc.collect()
    buffers = {
        (shard.device.id, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in jax.live_arrays()
        for shard in array.addressable_shards
    }
    bytes_of_device = np.zeros(jax.device_count())
    for (device, _), size in buffers.items():
        bytes_of_device[device] += size
    return bytes_of_device

"""Processes that do not have the devices that they should have."""

from types import SimpleNamespace

import pytest

from saejax.errors import UserError
from saejax.parallel.cluster import check_devices


def devices(*counts, platform="gpu"):
    return [
        SimpleNamespace(process_index=process, platform=platform)
        for process, count in enumerate(counts)
        for _ in range(count)
    ]


def test_equal_processes_with_all_their_gpus_may_run():
    check_devices(devices(8, 8), 1, range(8))
    check_devices(devices(4, 4, platform="tpu"), 0, None)
    check_devices(devices(1, 1, platform="cpu"), 0, None)


def test_gpus_that_are_left_idle_are_refused():
    with pytest.raises(UserError, match="has 8 GPUs, of which JAX uses 4: install"):
        check_devices(devices(4, 4), 0, range(8))
    with pytest.raises(UserError, match="has 1 GPUs, of which JAX uses 0"):  # JAX took the processor
        check_devices(devices(1, 1, platform="cpu"), 0, [0])


def test_unequal_processes_are_refused_with_their_numbers():
    with pytest.raises(UserError, match=r"\(process 0 has 8, process 1 has 7, process 2 has 8\)"):
        check_devices(devices(8, 7, 8), 0, range(8))

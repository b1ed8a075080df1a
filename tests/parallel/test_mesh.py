"""How the devices of slices and nodes, made up here or libtpu's, are arranged as a mesh; the memory of the host."""

import importlib.util
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest

from saejax.parallel import mesh
from saejax.parallel.mesh import arrange_devices, free_host_bytes
from saejax.preflight import topology


def chips(sizes, slices=1):
    """The chips of TPU slices of these sizes, in no order."""
    made = [
        SimpleNamespace(
            id=number, platform="tpu", device_kind="TPU v4", coords=coords, core_on_chip=0, slice_index=of_slice
        )
        for number, (of_slice, *coords) in enumerate(itertools.product(range(slices), *map(range, sizes)))
    ]
    random.Random(0).shuffle(made)
    return made


def hops(arranged):
    """How many links apart neighbours along the last axis are, at most."""
    coords = np.array([device.coords for device in arranged.flat]).reshape(*arranged.shape, 3)
    return int(np.abs(np.diff(coords, axis=-2)).sum(axis=-1).max())


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 1, 4), (1, 2, 8), (1, 8, 2)])
def test_neighbours_on_a_slice_are_linked(shape):
    devices = chips((4, 4, 1))
    arranged = arrange_devices(devices, shape)
    assert arranged.shape == shape and {device.id for device in arranged.flat} == set(range(16))
    assert hops(np.array(devices).reshape(shape)) > 1 or shape[-1] == 2
    assert hops(arranged) == 1 or shape == (1, 2, 8)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'tpu')")
@pytest.mark.parametrize(("name", "shape"), [("v5e:4x4", (1, 4, 4)), ("v6e:4x4", (4, 1, 4)), ("v5p:4x4x4", (4, 4, 4))])
def test_neighbours_on_the_slices_that_libtpu_knows_are_linked(name, shape):
    devices = topology.find_slice(name).devices
    arranged = arrange_devices(devices, shape)
    assert arranged.shape == shape and {device.id for device in arranged.flat} == {device.id for device in devices}
    assert hops(arranged) == 1


@pytest.mark.parametrize(("shape", "axes"), [((1, 4, 4), [1]), ((2, 2, 4), [0]), ((1, 1, 16), [2]), ((4, 1, 4), [0])])
def test_the_first_axis_that_can_goes_over_slices(shape, axes):
    arranged = arrange_devices(chips((4, 2, 1), slices=2), shape)
    of_slice = np.vectorize(lambda device: device.slice_index)(arranged)
    assert [axis for axis in range(3) if np.diff(of_slice, axis=axis).any()] == axes


def test_a_part_of_a_slice_with_holes_is_taken_as_it_is():
    devices = chips((2, 2, 1))[:3]
    assert arrange_devices(devices, (1, 3, 1)).ravel().tolist() == devices


@pytest.mark.parametrize(("shape", "axis"), [((1, 2, 4), 1), ((2, 1, 4), 0), ((1, 1, 8), 2)])
def test_nodes_of_gpus_are_the_outer_axis(shape, axis):
    """One process a node: whatever order JAX lists the GPUs in."""
    devices = [SimpleNamespace(id=i, platform="gpu", device_kind="H100", process_index=i // 4) for i in range(8)]
    arranged = arrange_devices(random.Random(1).sample(devices, 8), shape)
    nodes = np.vectorize(lambda device: device.process_index)(arranged)
    assert np.diff(nodes, axis=axis).any() and not any(np.diff(nodes, axis=a).any() for a in {0, 1, 2} - {axis})


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/job/step", {"": (9000, 0, 0), "job": (2000, 900, 300), "job/step": ("max", 500, 0)}, 1400),
        ("2:cpu:/\n4:cpuacct,memory:/pod\n0::/", {"memory": (2000, 2500, 100)}, 0),
        ("", {}, 5000),
    ],
)
def test_the_limit_of_a_batch_job_or_container_counts(monkeypatch, tmp_path, groups, files, free):
    """Its files are (most, used, pages of files that are given back); the tightest group counts."""
    for group, (most, used, read) in files.items():
        names = ("limit_in_bytes", "usage_in_bytes") if group == "memory" else ("max", "current")
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, value in zip((*names, "stat"), (most, used, f"anon 3\ninactive_file {read}\n"), strict=True):
            (tmp_path / group / f"memory.{name}").write_text(f"{value}\n")
    (tmp_path / "cgroup").write_text(f"{groups}\n" if groups else "")
    monkeypatch.setattr(mesh, "_GROUPS", tmp_path)
    monkeypatch.setattr(mesh, "_PROCESS_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(mesh.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert free_host_bytes() == free

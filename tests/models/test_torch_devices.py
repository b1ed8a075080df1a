"""Which devices PyTorch models run on, with PyTorch's GPUs made up."""

import os
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from tiny_models import OTHER_FIELDS, make_tiny

from saejax.errors import UserError
from saejax.models import torch_devices
from saejax.models.sites import Site
from saejax.models.torch_devices import own_device, place_model
from saejax.models.torch_hooks import HookedModel
from saejax.models.torch_model import _to_jax
from saejax.runner import environment


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of 1 MB in PyTorch, and a list of where models go."""
    placed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**6))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: placed.append(str(device)))
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, device_map: placed.append(device_map))
    return placed


def test_pytorch_takes_the_gpu_that_jax_takes(gpus, monkeypatch):
    """The processes of a node see all of its GPUs, and each has one."""
    device = SimpleNamespace(platform="gpu", local_hardware_id=3)
    assert str(own_device(device)) == "cuda:3"
    assert str(own_device()) == "cuda:0"  # of tests' JAX, which has processors alone
    monkeypatch.setattr(torch_devices.jax, "local_devices", lambda: [device])
    assert str(own_device()) == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(own_device()) == "cpu"


def test_values_come_to_a_jax_without_gpus_by_the_host(one_device):
    """JAX does not know the device of a tensor on a GPU then."""
    on_gpu = SimpleNamespace(cpu=lambda: torch.arange(3.0))
    assert np.asarray(_to_jax(on_gpu, one_device)).tolist() == [0, 1, 2]


def test_a_model_beyond_one_gpu_is_spread_by_whole_layers(gpus, monkeypatch):
    own, model = torch.device("cuda:1"), make_tiny("olmo", OTHER_FIELDS["olmo"])
    size = sum(weight.numel() * 4 for weight in model.parameters())
    place_model(model, own)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, size))  # activations need some
    monkeypatch.setattr(torch_devices.jax, "process_count", lambda: 2)
    place_model(model, own)
    assert gpus == ["cuda:1", "cuda:1"], "it fits, or the other GPU is another process's"
    monkeypatch.setattr(torch_devices.jax, "process_count", lambda: 1)
    memory = {0: 0.7 * size, 1: 0.7 * size}
    monkeypatch.setattr(accelerate.utils, "get_balanced_memory", lambda model, **options: memory)
    place_model(model, own)
    layers = {name: place for name, place in gpus.pop().items() if ".layers." in name}
    assert {name.count(".") for name in layers} == {2} and {*layers.values()} == {0, 1}
    memory[1] = 0.1 * size
    with pytest.raises(UserError, match="more than one GPU takes, and than 2 GPUs together: use larger or more"):
        place_model(model, own)


def test_sites_and_skipped_layers_of_a_spread_model():
    """accelerate replaces the forward function of each module; here all are on the processor."""
    model = make_tiny("olmo", OTHER_FIELDS["olmo"])
    names = (
        "model.embed_tokens",
        "model.rotary_emb",
        "model.norm",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    )
    spread = HookedModel(accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), force_hooks=True))
    assert "forward" in vars(spread.model.model.layers[0])
    values = {}

    def keep(site, value):
        values[site] = value.clone()
        return value

    ids_BxT, sites = np.arange(1, 7)[None], [Site("resid_pre", 0), Site("attn_out", 1), Site("resid_post", 1)]
    with torch.inference_mode():
        spread.run(ids_BxT, None, sites, keep)
        assert values[sites[1]].abs().max() > 1e-2 and not torch.equal(values[sites[0]], values[sites[2]])
        with spread.skipping(2):
            spread.run(ids_BxT, None, [sites[0], sites[2]], keep)
    assert torch.equal(values[sites[0]], values[sites[2]])


@pytest.mark.parametrize(
    ("shares", "has_cuda", "expected"), [(True, True, "false"), (True, False, None), (False, True, None)]
)
def test_jax_leaves_memory_to_a_pytorch_that_uses_the_gpu(monkeypatch, shares, has_cuda, expected):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    monkeypatch.setattr(environment, "_has_cuda_torch", lambda: has_cuda)
    environment.for_devices(deterministic=False, shares_gpu=shares)
    assert os.environ.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None) == expected

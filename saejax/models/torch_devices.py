"""Devices of PyTorch models: the GPU that JAX uses in this process, and several if one is too small."""

from typing import Any

import jax
import torch

from saejax.errors import UserError

_ROOM = 0.8  # share of a GPU's free memory that weights may take; the rest is for activations


def own_device(device: jax.Device | None = None) -> torch.device:
    """Return where PyTorch runs beside a device of JAX; the CPU if PyTorch has no GPU.

    Args:
      device: device of JAX; None: the first of this process.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = device or jax.local_devices()[0]
    # Each process of a node sees all of its GPUs, and JAX knows which is its own.
    return torch.device("cuda", device.local_hardware_id if device.platform == "gpu" else 0)


def place_model(model: Any, device: torch.device) -> Any:
    """Return a transformers model on a device, or spread over all GPUs if its weights do not fit there.

    Args:
      model: the model, on the CPU.
      device: from ``own_device``.

    Raises:
      UserError: all GPUs together are too small, or the package accelerate, which spreads models, is missing.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    # Other processes of the node use the other GPUs.
    is_alone = device.type == "cuda" and torch.cuda.device_count() > 1 and jax.process_count() == 1
    if not is_alone or size <= _ROOM * torch.cuda.mem_get_info(device)[0]:
        return model.to(device)
    name = f"{type(model).__name__} has {size / 1e9:.1f} GB of weights, more than one GPU takes"
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError:
        raise UserError(f"{name}: `pip install accelerate` to spread it over several") from None
    options = dict(no_split_module_classes=list(model._no_split_modules or ()))
    device_map = infer_auto_device_map(model, max_memory=get_balanced_memory(model, **options), **options)
    if {"cpu", "disk"} & {*map(str, device_map.values())}:
        raise UserError(f"{name}, and than {torch.cuda.device_count()} GPUs together: use larger or more GPUs")
    return dispatch_model(model, device_map)

"""Tensors of files that ``torch.save`` wrote (.bin, .pt, .pth): the one place where anything is unpickled."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes

from saejax.errors import UserError


def read_pickled_tensors(file: Path) -> Any:
    """Read a file of ``torch.save`` without running any code that it holds.

    The file is mapped into memory: values are read from disk when they are used. (Files from before PyTorch 1.6 cannot
    be mapped and are read whole.)

    Args:
      file: a state dict, or another nest of dictionaries, lists and tuples with tensors in it.

    Returns:
      The same nest with plain dictionaries, and NumPy arrays in place of tensors. Arrays keep the dtype of the file,
      bfloat16 as ``ml_dtypes.bfloat16``; they share memory where tensors do, and must not be written to. Numbers and
      texts stay as they are.

    Raises:
      UserError: the file is missing, truncated, of another format, or holds objects other than tensors.
    """
    import torch

    if not file.is_file():
        raise UserError(f"{file} is missing: fetch it again")
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(
                f"{file} holds objects other than tensors, which are not loaded because that can run code: expected "
                f"a state dict; save one with torch.save(model.state_dict(), ...)"
            ) from None
        raise UserError(f"{file} is truncated or not a file of torch.save: fetch it again") from None
    except Exception as error:  # torch raises whatever a damaged file makes its reader meet
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is truncated or not a file of torch.save ({reason}): fetch it again") from None
    return _to_numpy(loaded)


def _to_numpy(value: Any) -> Any:
    """Return a nest with NumPy arrays in place of torch tensors."""
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        if tensor.dtype == torch.bfloat16:  # NumPy itself has no such type
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        try:
            return tensor.numpy()
        except (TypeError, RuntimeError):  # sparse, quantised or 8-bit floats, which a reader may not need
            return value
    if isinstance(value, Mapping):
        return {name: _to_numpy(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_to_numpy(part) for part in value]
    return value

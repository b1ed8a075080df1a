"""Reading a checkpoint: safetensors, tensor by tensor, into the decoder's stacked and sharded parameters."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.decoder import parameter_table
from saejax.models.families import FAMILIES, Weight
from saejax.parallel import fitting_sharding
from saejax.workspace import read_json

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file: ``offset`` bytes from its start, row-major."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def map(self) -> np.ndarray:
        """The values, mapped from the file: only what is used is read."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, the values.

    Raises:
      UserError: the file is truncated or not in that format.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"it should have {end} bytes and has {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}): fetch the model again") from None
    return tensors


def _tensor(file: Path, start: int, name: str, entry: Mapping) -> Tensor:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in _DTYPES:
        raise UserError(
            f"{file}: tensor {name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}: "
            "use an unquantised model"
        )
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if last - first != dtype.itemsize * math.prod(shape):
        raise ValueError(f"tensor {name} has {last - first} bytes for the shape {shape}")
    return Tensor(file, start + first, dtype, shape)


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a checkpoint: those that its index names, or ``model.safetensors``.

    Raises:
      UserError: there are none, or one is missing.
    """
    if (folder / _INDEX).exists():
        files = sorted({folder / name for name in read_json(folder / _INDEX)["weight_map"].values()})
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(
            f"{folder} has no {', '.join(missing)}: expected a folder with config.json and safetensors weights"
        )
    return files


def load_params(folder: Path, config: DecoderConfig, mesh: Mesh, dtype: str) -> dict[str, jax.Array]:
    """Reads the checkpoint in ``folder`` into the parameters of ``decoder.parameter_table``.

    Each process reads what its devices hold. Host memory holds one parameter, stacked over layers, at a time.

    Args:
      folder: a folder in the hub's format.
      config: its configuration.
      mesh: where to place the parameters; what its ``model`` axis does not divide is replicated.
      dtype: "float32" or "bfloat16".

    Raises:
      UserError: a tensor is missing, of another shape, or left over; all of them are listed.
    """
    tensors: dict[str, Tensor] = {}
    for file in safetensors_files(folder):
        tensors |= read_header(file)
    problems = _mismatches(config, tensors)
    if problems:
        raise UserError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")
    weights = FAMILIES[config.family].weights
    return {
        name: _place(_reader(config, weights[name], name, shape, tensors), shape, dtype, mesh, spec)
        for name, (shape, spec) in parameter_table(config).items()
    }


def _sources(config: DecoderConfig, name: str, weight: Weight) -> list[str]:
    """The tensors of a parameter: one, or one for each layer."""
    return (
        [weight.name.format(layer) for layer in range(config.n_layers)] if name.startswith("layers.") else [weight.name]
    )


def _mismatches(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    family = FAMILIES[config.family]
    problems, used = [], set()
    for name, (shape, _) in parameter_table(config).items():
        for source in _sources(config, name, family.weights[name]):
            used.add(source)
            if source not in tensors:
                problems.append(f"{source} is missing")
                continue
            wanted = shape[1:] if name.startswith("layers.") else shape
            try:
                family.weights[name].view(tensors[source].map(), wanted)
            except ValueError as error:
                problems.append(f"{source} {error}")
    used |= {name.format(layer) for name in family.ignored for layer in range(config.n_layers)}
    if config.tied and not problems:
        embed, head = (family.weights[name].name for name in ("embed_VxD", "unembed_DxV"))
        used.add(head)
        if head in tensors and not np.array_equal(tensors[embed].map(), tensors[head].map()):
            problems.append(f"{head} differs from {embed}, though tie_word_embeddings is true")
    return problems + [f"{name} is left over" for name in sorted(set(tensors) - used)]


def _reader(
    config: DecoderConfig, weight: Weight, name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> Callable[[tuple[slice, ...], np.ndarray], None]:
    """A function that fills a buffer with the part of the parameter at an index."""
    stacked = name.startswith("layers.")
    sources = [tensors[source] for source in _sources(config, name, weight)]

    def fill(index: tuple[slice, ...], buffer: np.ndarray) -> None:
        if not stacked:
            buffer[...] = weight.view(sources[0].map(), shape)[index]
            return
        for row, source in enumerate(sources[index[0]]):
            buffer[row] = weight.view(source.map(), shape[1:])[index[1:]]

    return fill


def _place(
    fill: Callable[[tuple[slice, ...], np.ndarray], None],
    shape: tuple[int, ...],
    dtype: str,
    mesh: Mesh,
    spec: tuple[str | None, ...],
) -> jax.Array:
    sharding: NamedSharding = fitting_sharding(mesh, shape, *spec)
    parts: dict[str, np.ndarray] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        if str(index) not in parts:
            sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
            parts[str(index)] = _aligned(sizes, np.dtype(jax.numpy.dtype(dtype)))
            fill(index, parts[str(index)])
        arrays.append(jax.device_put(parts[str(index)], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose memory a CPU device takes over as it is (aligned to 64 bytes), without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)

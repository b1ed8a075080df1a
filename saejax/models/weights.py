"""Reading a checkpoint: safetensors, tensor by tensor, into the decoder's stacked and sharded parameters."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from saejax.errors import UserError
from saejax.models.checkpoint import Tensor, read_checkpoint
from saejax.models.config import DecoderConfig
from saejax.models.families import FAMILIES, Weight
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel.mesh import fitting_sharding


def load_params(
    folder: Path, config: DecoderConfig, mesh: Mesh, dtype: str, layers: int | None = None
) -> dict[str, jax.Array]:
    """Reads the checkpoint in ``folder`` into the parameters of ``parameters.parameter_table``.

    Each process reads what its devices hold. Beside what it keeps, host memory holds one tensor of the checkpoint at a
    time; the largest come first, while little else is there.

    Args:
      folder: a folder in the hub's format.
      config: its configuration, of all its layers.
      mesh: where to place the parameters; what its ``model`` axis does not divide is replicated.
      dtype: "float32" or "bfloat16".
      layers: read only the first so many, 1 to ``config.n_layers``: the parameters "layers.*" then have so many rows,
        which is enough for a pass that ends there. None: all. The whole checkpoint is checked either way.

    Raises:
      UserError: a tensor is missing, of another shape, or left over; all of them are listed.
    """
    family = FAMILIES[config.family]
    weights = family.weights
    tensors = _prefixed(family.needed(read_checkpoint(folder)), weights["embed_VxD"].name)
    problems = _mismatches(config, tensors)
    if problems:
        raise UserError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")
    table = parameter_table(config)
    params = {}
    largest = {name: max(tensors[one].nbytes for one in _sources(config, name, weights[name])) for name in table}
    for name in sorted(table, key=lambda name: -largest[name]):
        shape, spec = table[name]
        sources = [tensors[source] for source in _sources(config, name, weights[name])]
        if name.startswith(LAYERS):
            sources = sources[:layers]
            shape = (len(sources), *shape[1:])
        params[name] = _place(_reader(weights[name], name, shape, sources), shape, dtype, mesh, spec)
    return {name: params[name] for name in table}


def _prefixed(tensors: Mapping[str, Tensor], example: str) -> dict[str, Tensor]:
    """The tensors with the prefix that a checkpoint leaves away if it was saved without the model's head.

    Args:
      tensors: by their names in the checkpoint.
      example: the whole name of a tensor that every checkpoint has, such as "model.embed_tokens.weight".
    """
    prefix, _, rest = example.partition(".")
    if example in tensors or rest not in tensors:
        return dict(tensors)
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _sources(config: DecoderConfig, name: str, weight: Weight) -> list[str]:
    """The tensors of a parameter: one, or one for each layer."""
    return [weight.name.format(layer) for layer in range(config.n_layers)] if name.startswith(LAYERS) else [weight.name]


def _mismatches(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    family = FAMILIES[config.family]
    problems, used = [], set()
    for name, (shape, _) in parameter_table(config).items():
        for source in _sources(config, name, family.weights[name]):
            used.add(source)
            if source not in tensors:
                problems.append(f"{source} is missing")
                continue
            wanted = shape[1:] if name.startswith(LAYERS) else shape
            try:
                family.weights[name].view(tensors[source].map(), wanted)
            except ValueError as error:
                problems.append(f"{source} {error}")
    if config.tied and not problems:
        embed, head = (family.weights[name].name for name in ("embed_VxD", "unembed_DxV"))
        used.add(head)
        if head in tensors and not tensors[embed].equals(tensors[head]):
            problems.append(f"{head} differs from {embed}, though tie_word_embeddings is true")
    problems = list(dict.fromkeys(problems))  # several parameters may be parts of one tensor
    return problems + [f"{name} is left over" for name in sorted(set(tensors) - used)]


def _reader(
    weight: Weight, name: str, shape: tuple[int, ...], sources: list[Tensor]
) -> Callable[[tuple[slice, ...], np.ndarray], None]:
    """A function that fills a buffer with the part of the parameter at an index."""

    def fill(index: tuple[slice, ...], buffer: np.ndarray) -> None:
        if not name.startswith(LAYERS):
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

"""Reading a checkpoint, tensor by tensor, into the decoder's stacked and sharded parameters."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from saejax.errors import UserError
from saejax.models.checkpoint import Tensor, not_finite_error, read_checkpoint
from saejax.models.config import DecoderConfig
from saejax.models.families import FAMILIES, Weight
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel.mesh import fitting_sharding

_LISTED = 30  # problems of a checkpoint that a message lists
_CHECKED = 1 << 20  # numbers at once, for NaN and infinity


def load_params(
    folder: Path, config: DecoderConfig, mesh: Mesh, dtype: str, layers: int | None = None
) -> dict[str, jax.Array]:
    """Read the checkpoint in ``folder`` into the parameters of ``parameters.parameter_table``.

    Each process reads what its devices hold. Besides the result, host memory holds one tensor of the checkpoint at a
    time; the largest come first, while little else is there. Tensors that the family does not use are never looked at.

    Args:
      folder: a folder in the hub's format.
      config: its configuration, of all its layers.
      mesh: where to place the parameters; what its ``model`` axis does not divide is replicated.
      dtype: "float32" or "bfloat16".
      layers: read only the first so many, 1 to ``config.n_layers``: the parameters "layers.*" then have so many rows,
        which is enough for a pass that ends there. None: all. All tensors are checked either way.

    Raises:
      UserError: tensors are missing, of another shape, or not floats, or hold NaN or infinity; all are listed.
    """
    sources = _find_sources(config, read_checkpoint(folder))
    problems = _mismatches(config, sources)
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "; ".join(problems[:_LISTED]) + more
        raise UserError(f"the weights in {folder} do not fit its config.json: {listed}")
    weights, table, params = FAMILIES[config.family].weights, parameter_table(config), {}
    damaged: list[str] = []
    tensors = {name: [tensor for _, tensor in stored if tensor is not None] for name, stored in sources.items()}
    for name in sorted(table, key=lambda name: -max(tensor.nbytes for tensor in tensors[name])):
        shape, spec = table[name]
        if name.startswith(LAYERS):
            shape = (min(layers or shape[0], shape[0]), *shape[1:])
        params[name], is_finite = _place(_reader(weights[name], shape, tensors[name]), shape, dtype, mesh, spec)
        if not is_finite:
            damaged.append(name)
    if damaged:
        # Tensors of the files, where these hold NaN; where they do not, the dtype's range was too small.
        files = {tensor.name for name in damaged for tensor in tensors[name] if not np.isfinite(tensor.map()).all()}
        raise not_finite_error(f"the weights in {folder}", sorted(files) or damaged, dtype)
    return {name: params[name] for name in table}


def untie_stored_head(folder: Path, config: DecoderConfig) -> DecoderConfig:
    """Return the configuration for what the checkpoint stores, as transformers reads it.

    A head that ``tie_word_embeddings`` declares to be the embedding, and that is stored with other values than the
    embedding, is used as it is stored.
    """
    if not config.tied:
        return config
    tensors, untied = read_checkpoint(folder), dataclasses.replace(config, tied=False)
    sources = _find_sources(untied, tensors)
    (_, embed), (_, head) = sources["embed_VxD"][0], sources["unembed_DxV"][0]
    if head is None or embed is None or head.dtype_problem or embed.dtype_problem or head is embed:
        return config
    same = head.shape == embed.shape and all(
        np.array_equal(embed.map()[rows], head.map()[rows])  # some rows at a time, which bounds memory
        for rows in (slice(start, start + 4096) for start in range(0, embed.shape[0], 4096))
    )
    return config if same else untied


# Of each parameter: the family's names of its tensors, and what was found. There is one for each index of the leading
# dimensions for which the name has a "{}": layers, and experts.
Sources = dict[str, list[tuple[str, Tensor | None]]]


def _find_sources(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> Sources:
    """Return the tensors of each parameter."""
    weights = FAMILIES[config.family].weights
    find = functools.partial(_find, tensors, *_prefixes(tensors, weights))
    sources: Sources = {}
    for name, (shape, _) in parameter_table(config).items():
        names = [weights[name].name.format(*index) for index in np.ndindex(*shape[: weights[name].stacked])]
        sources[name] = [(stored_name, find(stored_name)) for stored_name in names]
        if name == "embed_VxD" and config.tied and sources[name][0][1] is None:
            head = find(weights["unembed_DxV"].name)  # tied the other way round
            sources[name] = [(names[0], head)]
    return sources


def _prefixes(tensors: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> tuple[str, str]:
    """Return what the family's names of the model's body start with, and what the checkpoint's do.

    A model that was saved without its head lacks the prefix ("h.0." for "transformer.h.0."), and one that is part of
    another has one more ("language_model.model.layers." for "model.layers.").
    """
    example = weights[f"{LAYERS}o_HxKxD"].name.format(0)
    prefix, _, body = example.partition(".")
    prefixes = [name.removesuffix(body) for name in tensors if name == body or name.endswith(f".{body}")]
    chosen = f"{prefix}." if f"{prefix}." in prefixes or not prefixes else sorted(prefixes, key=_is_other_tower)[0]
    return f"{prefix}.", chosen


def _is_other_tower(prefix: str) -> tuple[bool, str]:
    """Sort language models before the towers for images and sound of the same checkpoint."""
    return any(word in prefix for word in ("vision", "visual", "audio", "image")), prefix


def _find(tensors: Mapping[str, Tensor], prefix: str, stored: str, name: str) -> Tensor | None:
    """Return the tensor of one of the family's names, which may be stored under another prefix or another name."""
    if name.startswith(prefix):
        return tensors.get(stored + name.removeprefix(prefix))
    outer = stored.removesuffix(prefix)  # of the head, which stands beside the body
    heads = [name, *_HEADS] if name in _HEADS else [name]
    # The head stands beside the body in most files, and within it in others.
    places = [start + head for head in heads for start in ("", outer, stored)]
    return next((tensors[place] for place in places if place in tensors), None)


_HEADS = ("lm_head.weight", "embed_out.weight")  # versions of transformers differ in which of them GPT-NeoX has


def _mismatches(config: DecoderConfig, sources: Sources) -> list[str]:
    """Return a message for each tensor that is missing or cannot be used."""
    problems = []
    for name, (shape, _) in parameter_table(config).items():
        weight = FAMILIES[config.family].weights[name]
        for source, tensor in sources[name]:
            if tensor is None:
                problems.append(f"{source} is missing")
            elif tensor.dtype_problem:
                problems.append(f"{source} {tensor.dtype_problem}")
            else:
                try:
                    # A view of the mapped file: its shape is checked without reading its values.
                    weight.view(tensor.map(), shape[weight.stacked :])
                except ValueError as error:
                    problems.append(f"{source} {error}")
    return list(dict.fromkeys(problems))  # several parameters may be parts of one tensor


def _reader(
    weight: Weight, shape: tuple[int, ...], sources: list[Tensor]
) -> Callable[[tuple[slice, ...], np.ndarray], None]:
    """Return a function that fills a buffer with the part of the parameter at an index."""
    lead = weight.stacked

    def fill(index: tuple[slice, ...], buffer: np.ndarray) -> None:
        """Write the part of the parameter at an index to a buffer."""
        ranges = [range(size)[part] for size, part in zip(shape[:lead], index[:lead], strict=True)]
        for place, at in zip(np.ndindex(*map(len, ranges)), itertools.product(*ranges), strict=True):
            source = sources[int(np.ravel_multi_index(at, shape[:lead])) if lead else 0]
            buffer[place] = weight.view(source.map(), shape[lead:])[index[lead:]]

    return fill


def _place(
    fill: Callable[[tuple[slice, ...], np.ndarray], None],
    shape: tuple[int, ...],
    dtype: str,
    mesh: Mesh,
    spec: tuple[str | None, ...],
) -> tuple[jax.Array, bool]:
    """Return a parameter on the devices of a mesh, each shard read once, and whether what was read is finite."""
    sharding: NamedSharding = fitting_sharding(mesh, shape, *spec)
    parts: dict[str, np.ndarray] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        # Devices with the same part of a parameter share one buffer, which is read once.
        if str(index) not in parts:
            sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
            parts[str(index)] = _aligned(sizes, np.dtype(jnp.dtype(dtype)))
            fill(index, parts[str(index)])
        arrays.append(jax.device_put(parts[str(index)], device))
    # Some numbers at a time, which bounds memory.
    flat = [part.reshape(-1) for part in parts.values()]
    finite = all(np.isfinite(p_N[i : i + _CHECKED]).all() for p_N in flat for i in range(0, p_N.size, _CHECKED))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays), finite


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array that a CPU device takes over without a copy, as it is aligned to 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)

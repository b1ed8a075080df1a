"""Reading a checkpoint, tensor by tensor, into the decoder's stacked and sharded parameters."""

import collections
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from saejax.errors import UserError
from saejax.models.checkpoint import Tensor, find_unread, not_finite_error, read_checkpoint, warn_of_unread
from saejax.models.config import DecoderConfig
from saejax.models.families import FAMILIES, Weight
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel.mesh import fitting_sharding, read_parts
from saejax.parallel.stopping import interruptible
from saejax.progress import OnProgress, silent

_LISTED = 30  # problems of a checkpoint that a message lists
_CHECKED = 1 << 20  # numbers at once, for NaN and infinity
_READERS = min(8, os.cpu_count() or 1)  # threads that read
_PART_BYTES = 1 << 26  # of the layers that are read at once, unless the shard of a single one is larger


def load_params(
    folder: Path,
    config: DecoderConfig,
    mesh: Mesh,
    dtype: str,
    layers: int | None = None,
    on_progress: OnProgress = silent,
) -> dict[str, jax.Array]:
    """Read the checkpoint in ``folder`` into the parameters of ``parameters.parameter_table``.

    Each process reads the shards of its devices, one by one and some layers at a time, in several threads. So the host
    holds, for each thread, a device's shard of one layer or at most 64 MiB of several layers. Of tensors of the model's
    body that are not read, a warning names those that could count.

    Args:
      folder: a folder in the hub's format.
      config: its configuration, of all its layers.
      mesh: where to place the parameters; what its ``model`` axis does not divide is replicated.
      dtype: "float32" or "bfloat16".
      layers: read only the first so many, 1 to ``config.n_layers``: the parameters "layers.*" then have so many rows,
        which is enough for a pass that ends there. None: all. All tensors are checked either way.
      on_progress: called with the numbers that are on the devices and all.

    Raises:
      UserError: tensors are missing, of another shape, or not floats, hold NaN or infinity, or are parameters that the
        configuration leaves out, such as biases; all are listed.
    """
    stored = read_checkpoint(folder)
    sources = _find_sources(config, stored)
    superfluous, unread = _find_unread(config, stored, sources)
    problems = _mismatches(config, sources) + superfluous
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "; ".join(problems[:_LISTED]) + more
        raise UserError(f"the weights in {folder} do not fit its config.json: {listed}")
    warn_of_unread(folder, *unread, config.n_layers)
    weights, table = FAMILIES[config.family].weights, parameter_table(config)
    tensors = {name: [tensor for _, tensor in stored if tensor is not None] for name, stored in sources.items()}
    readers: list[_Reader] = []
    # The largest come first, while little else is in memory.
    for name in sorted(table, key=lambda name: -max(tensor.nbytes for tensor in tensors[name])):
        shape, spec = table[name]
        if name.startswith(LAYERS):
            shape = (min(layers or shape[0], shape[0]), *shape[1:])
        where = fitting_sharding(mesh, shape, *spec)
        readers.append(_Reader(name, weights[name], tensors[name], shape, np.dtype(jnp.dtype(dtype)), where))
    params, damaged = _read_params(readers, on_progress)
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


def _find_unread(
    config: DecoderConfig, tensors: Mapping[str, Tensor], sources: Sources
) -> tuple[list[str], tuple[list[str], int]]:
    """Return what the model's body holds beyond what is read.

    Returns:
      A message for each parameter of the family that the configuration leaves out and that would change results; and
      other tensors, and the number of layers, as ``find_unread`` has them.
    """
    weights, table = FAMILIES[config.family].weights, parameter_table(config)
    prefix, start = _prefixes(tensors, weights)
    read = {tensor.name for pairs in sources.values() for _, tensor in pairs if tensor is not None}
    of_body = [name for name in tensors if name.startswith(start) and name not in read and not name.endswith(_HEADS)]
    names, beyond = find_unread(of_body, config.n_layers)
    left_out = {weight.name for weight in weights.values()} - {weights[name].name for name in table}
    patterns = {name: re.sub(r"(?<=\.)\d+(?=\.)", "{}", prefix + name.removeprefix(start)) for name in names}
    excess = [name for name, pattern in patterns.items() if pattern in left_out]
    # A bias of zeros is the same as none.
    superfluous = [name for name in excess if not name.endswith("bias") or np.any(tensors[name].map())]
    messages = [f"{name} is there, and config.json says that the model has none" for name in superfluous]
    return messages, ([name for name in names if name not in excess], beyond)


class _Part(NamedTuple):
    """Part of a parameter, on the host."""

    parameter: str
    values: np.ndarray
    is_finite: bool


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A parameter that is read part by part."""

    name: str
    weight: Weight
    sources: list[Tensor]  #: one for each index of its leading ``weight.stacked`` dimensions
    shape: tuple[int, ...]
    dtype: np.dtype
    where: NamedSharding

    def part_shapes(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the parts that are placed at once: the first of some layers, and the shape of these layers."""
        layers, *rest = self.shape
        layer_bytes = math.prod(self.where.shard_shape(self.shape)[1:]) * self.dtype.itemsize
        count = max(1, _PART_BYTES // layer_bytes) if self.weight.stacked else layers
        yield from ((start, (min(count, layers - start), *rest)) for start in range(0, layers, count))

    def shards(self) -> Iterator[Callable[[], _Part]]:
        """Yield functions that read a shard each, in the order in which ``mesh.read_parts`` asks for them."""
        for start, shape in self.part_shapes():
            indices = self.where.addressable_devices_indices_map(shape).values()
            for index in {str(index): index for index in indices}.values():
                first, *rest = index
                inside = range(shape[0])[first]
                yield functools.partial(self.read, (slice(start + inside.start, start + inside.stop), *rest))

    def read(self, index: tuple[slice, ...]) -> _Part:
        """Return the values at an index."""
        lead = self.weight.stacked
        values = _aligned(
            [len(range(*of.indices(size))) for of, size in zip(index, self.shape, strict=True)], self.dtype
        )
        ranges = [range(size)[of] for size, of in zip(self.shape[:lead], index[:lead], strict=True)]
        for place, at in zip(np.ndindex(*map(len, ranges)), itertools.product(*ranges), strict=True):
            source = self.sources[int(np.ravel_multi_index(at, self.shape[:lead])) if lead else 0]
            _copy(values[place], self.weight.view(source.map(), self.shape[lead:])[index[lead:]])
        return _Part(self.name, values, _is_finite(values))


@interruptible()
def _read_params(readers: list[_Reader], on_progress: OnProgress = silent) -> tuple[dict[str, jax.Array], list[str]]:
    """Return the parameters on their devices, and the names of parameters with numbers that are not finite."""
    params: dict[str, jax.Array] = {}
    damaged: list[str] = []
    done, total = 0, sum(math.prod(reader.shape) for reader in readers)

    def take(index: tuple[slice, ...]) -> np.ndarray:
        """Return the next shard, which ``mesh.read_parts`` asks for in the order of ``_Reader.shards``."""
        part = next(parts)
        if not part.is_finite and part.parameter not in damaged:
            damaged.append(part.parameter)
        return part.values

    with ThreadPoolExecutor(_READERS, "weights") as pool:
        parts = _run_ahead(pool, itertools.chain.from_iterable(reader.shards() for reader in readers))
        for reader in readers:
            for start, shape in reader.part_shapes():
                array = read_parts(shape, reader.where, take)
                if shape != reader.shape:
                    if start == 0:
                        params[reader.name] = jnp.zeros(reader.shape, array.dtype, device=reader.where)
                    array = _put_layers(params[reader.name], array, start)
                # Until a shard is on its device it takes memory of the host.
                params[reader.name] = jax.block_until_ready(array)
                done += math.prod(shape)
                on_progress(done, total)
    return params, damaged


def _run_ahead(pool: ThreadPoolExecutor, reads: Iterable[Callable[[], _Part]]) -> Iterator[_Part]:
    """Yield what functions return, in their order, while at most ``_READERS`` others run or wait to be taken."""
    futures: collections.deque[Future[_Part]] = collections.deque()
    for read in reads:
        futures.append(pool.submit(read))
        if len(futures) > _READERS:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


@functools.partial(jax.jit, donate_argnums=0)
def _put_layers(stack: jax.Array, layers: jax.Array, start: int) -> jax.Array:
    """Return the stack with some layers from ``start`` on, in its own memory."""
    return lax.dynamic_update_slice_in_dim(stack, layers, start, 0)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy numbers to an array of another dtype."""
    # NumPy copies its own dtypes alone while other threads run. Bfloat16, which is none, is the upper half of float32.
    if source.dtype == target.dtype == ml_dtypes.bfloat16:
        target.view(np.uint16)[...] = source.view(np.uint16)
    elif source.dtype == ml_dtypes.bfloat16 and target.dtype == np.float32:
        bits = target.view(np.uint32)
        bits[...] = source.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    else:
        target[...] = source


def _is_finite(values: np.ndarray) -> bool:
    """Return whether no number is NaN or infinite, in bfloat16 with all bits of the exponent set."""
    numbers, exponent = values.reshape(-1), np.uint16(0x7F80)
    for start in range(0, numbers.size, _CHECKED):  # some at a time, which bounds memory
        some = numbers[start : start + _CHECKED]
        is_bfloat16 = some.dtype == ml_dtypes.bfloat16
        bad = (some.view(np.uint16) & exponent) == exponent if is_bfloat16 else ~np.isfinite(some)
        if bad.any():
            return False
    return True


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array that a CPU device takes over without a copy, as it is aligned to 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)

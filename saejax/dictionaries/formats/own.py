"""Our own format: an Orbax checkpoint of the arrays and ``dictionary.json`` that describes them.

arrays/             Orbax checkpoint of the arrays of ``modules.parameter_table``, by name
dictionary.json     a schema version; the DictionaryConfig; shape, dtype and SHA-256 of every array. Written last.

Devices write and read their own parts of arrays, so that no host and no device needs room for a whole one. Of a matrix
that is split by features, the SHA-256 is that of the features' own ones in their order: each device's part gives those
of its features, and the whole is the same however the matrix was split.
"""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from saejax.config import from_json, to_json
from saejax.dictionaries.formats import tensors
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.modules import Dictionary, DictionaryConfig, parameter_table, placements
from saejax.errors import UserError
from saejax.files import read_object, refuse_patterns, write_json
from saejax.parallel.collectives import is_first_process, local_parts, process_count, sum_over_processes, to_host
from saejax.parallel.mesh import place_on

DESCRIPTION, ARRAYS = "dictionary.json", "arrays"
SCHEMA_VERSION = 1  # of the description; the first files do not state it
_KEYS = ("schema_version", "config", "arrays")
_CHUNK_BYTES = 2**25  # of a file's chunk, which is read as a whole, whatever part of it a device needs
_HASHED_AT_ONCE = 1024  # features whose values are copied at a time
_REMOVED = ("context",)  # fields of earlier versions that nothing reads


@contextlib.contextmanager
def quiet_absl() -> Iterator[None]:
    """Silence absl meanwhile: Orbax logs every save, and every failure that it raises, with its traceback."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def save(folder: Path, dictionary: Dictionary) -> None:
    """Write a dictionary; every process of a run must call it.

    Args:
      folder: the folder to write to; made if missing. A dictionary that is already described there is a ``UserError``.
      dictionary: the dictionary.
    """
    folder = Path(folder).absolute()
    tensors.require_folder(folder)
    refuse_patterns(folder)
    if (folder / DESCRIPTION).exists():
        raise UserError(f"{folder} already holds a dictionary: delete it or name another folder")
    if is_first_process():
        shutil.rmtree(folder / ARRAYS, ignore_errors=True)  # what a killed save left, never described
        folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: _as_saved(array) for name, array in dictionary.arrays.items()}
    # Without a file of the devices: on others, Orbax would not open the folder unless told where arrays should be.
    storage = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_CHUNK_BYTES)
    saving = ocp.options.ArrayOptions.Saving(storage_options=storage, enable_write_sharding_file=False)
    with quiet_absl(), ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving)):
        ocp.save(folder / ARRAYS, arrays)
    facts = {name: _describe_array(dictionary.config, name, array) for name, array in arrays.items()}
    if is_first_process():
        described = dict(schema_version=SCHEMA_VERSION, config=to_json(dictionary.config), arrays=facts)
        write_json(folder / DESCRIPTION, described)


def read_config(folder: Path) -> DictionaryConfig:
    """Return the configuration of the dictionary in a folder, without reading its arrays."""
    return _read_description(Path(folder) / DESCRIPTION)[0]


def _read_description(path: Path) -> tuple[DictionaryConfig, dict[str, Any]]:
    """Return the configuration in a description, and the facts of each array by its name.

    Raises:
      UserError: it is damaged, or a newer version of this package wrote it.
    """
    described = read_object(path, "config", "arrays")
    version = described.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has the schema version {version!r}, and this version of saejax reads {SCHEMA_VERSION}: a newer "
            "one wrote it"
        )
    if unknown := sorted(set(described) - set(_KEYS)):
        raise UserError(f"{path} has {', '.join(unknown)}, unknown to this version of saejax: a newer one wrote it")
    for name in ("config", "arrays"):
        if not isinstance(described[name], dict):
            raise UserError(f"{path}: {name} is {described[name]!r:.60}, expected an object: the file is damaged")
    saved = {name: value for name, value in described["config"].items() if name not in _REMOVED}
    missing = [name for name in ("kind", "site", "d_in", "n_features") if name not in saved]
    if missing:
        raise UserError(f"{path} does not say {', '.join(missing)}: it is damaged")
    config = from_json(DictionaryConfig, saved, path, "config")
    if "k" in by_name(config.kind).numbers and not 1 <= config.k <= config.n_features:
        raise UserError(f"{path}: k is {config.k}: expected a whole number from 1 to the {config.n_features} features")
    return config, described["arrays"]


def load(folder: Path, matmul_dtype: str = "float32", dtype: str = "float32", mesh: Mesh | None = None) -> Dictionary:
    """Read what ``save`` wrote, and check shape, dtype and checksum of every array.

    Args:
      folder: holds ``dictionary.json``.
      matmul_dtype: dtype of the operands of matrix products.
      dtype: dtype of its matrices on the device, see ``tensors.Published.load``.
      mesh: the devices, each of which reads its part; None: as for ``load_dictionary``.
    """
    folder = Path(folder).absolute()
    config, described = _read_description(folder / DESCRIPTION)
    with tensors.description_errors(folder / DESCRIPTION):
        facts = {name: (tuple(of["shape"]), np.dtype(of["dtype"])) for name, of in described.items()}
        where = placements(config, mesh) if mesh else {}

        def target(name: str, shape: tuple[int, ...], saved: np.dtype) -> Any:
            # On the host where nobody says where, and in float64 where that was trained and JAX would round it.
            if name in where and saved == jax.dtypes.canonicalize_dtype(saved):
                return jax.ShapeDtypeStruct(shape, saved, sharding=where[name])
            return np.empty(shape, saved)

        targets = {name: target(name, *of) for name, of in facts.items()}
    process = jax.process_index()
    # Each process reads for itself. Orbax would have all wait for one another, and numbers such meetings by how often
    # each process has read and written: they would never meet again once one of them has read something alone.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"reader{process}"
    )
    try:
        with quiet_absl(), ocp.Context(multiprocessing_options=alone):
            arrays = ocp.load(folder / ARRAYS, targets)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged or missing checkpoint
        raise UserError(f"{folder / ARRAYS} cannot be restored ({type(error).__name__}): damaged or missing") from error
    for name in parameter_table(config):
        if name not in arrays or _describe_array(config, name, arrays[name]) != described[name]:
            raise UserError(f"{folder / ARRAYS}: {name} does not match {DESCRIPTION}: the files are damaged")
    tensors.check_finite(folder / ARRAYS, arrays)
    # Without a mesh from the host, and so committed to no device: it goes with activations on whatever devices they
    # are. Without JAX_ENABLE_X64=1 float64 becomes float32 here.
    placed = {
        name: place_on(array.astype(jax.dtypes.canonicalize_dtype(array.dtype)), where[name])
        if name in where
        else jnp.asarray(array)
        for name, array in arrays.items()
    }
    for name in tensors.MATRICES if dtype != "auto" else ():
        if name in placed and (dtype == "bfloat16" or placed[name].dtype == jnp.bfloat16):
            placed[name] = placed[name].astype(dtype)
    with tensors.description_errors(folder / DESCRIPTION):
        return Dictionary(config, matmul_dtype, **placed)


def _as_saved(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Return an array whose parts devices write, or on the host where every process of several has all of it."""
    if isinstance(array, jax.Array) and (process_count() == 1 or not array.is_fully_addressable):
        return array
    return np.asarray(array)


def _describe_array(config: DictionaryConfig, name: str, array: jax.Array | np.ndarray) -> dict:
    """Return shape, dtype and checksum of an array, as ``dictionary.json`` holds them."""
    table = parameter_table(config)
    axes = table[name][1] if name in table else ()
    if len(array.shape) == 2 and "model" in axes:
        digest = hashlib.sha256(_feature_hashes(array, axes.index("model")).tobytes())
    else:
        digest = hashlib.sha256(np.ascontiguousarray(to_host(array)).data)
    return dict(shape=list(array.shape), dtype=np.dtype(array.dtype).name, sha256=digest.hexdigest())


def _feature_hashes(array: jax.Array | np.ndarray, axis: int) -> np.ndarray:
    """Return the SHA-256 of each feature's values in a matrix, which has features along ``axis``: uint32 [F, 8]."""
    hashes_Fx8 = np.zeros((array.shape[axis], 8), np.uint32)
    for index, part in local_parts(array):
        first, of_feature = index[axis].start or 0, np.moveaxis(part, axis, 0)
        for start in range(0, len(of_feature), _HASHED_AT_ONCE):
            some = np.ascontiguousarray(of_feature[start : start + _HASHED_AT_ONCE]).view(np.uint8)
            for place, values in enumerate(some, first + start):
                hashes_Fx8[place] = np.frombuffer(hashlib.sha256(values.data).digest(), np.uint32)
    # Of a feature one process alone has the values that count, and the others have zeros.
    is_shared = isinstance(array, jax.Array) and not array.is_fully_addressable
    return sum_over_processes(hashes_Fx8) if is_shared else hashes_Fx8

"""Our own format: an Orbax checkpoint of the arrays and ``dictionary.json`` that describes them.

arrays/             Orbax checkpoint of the arrays of ``modules.parameter_table``, by name
dictionary.json     the DictionaryConfig; shape, dtype and SHA-256 of every array. Written last.
"""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from saejax.config import from_json, to_json
from saejax.dictionaries.formats import tensors
from saejax.dictionaries.modules import Dictionary, DictionaryConfig, parameter_table
from saejax.errors import UserError
from saejax.files import read_object, write_json
from saejax.parallel.collectives import is_first_process, to_host

DESCRIPTION, ARRAYS = "dictionary.json", "arrays"
_REMOVED = ("context",)  # fields of earlier versions that nothing reads


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silence absl for a moment: Orbax logs every save, and every failure that it raises, with its traceback."""
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
    if (folder / DESCRIPTION).exists():
        raise UserError(f"{folder} already holds a dictionary: delete it or name another folder")
    if is_first_process():
        shutil.rmtree(folder / ARRAYS, ignore_errors=True)  # what a killed save left, never described
        folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: to_host(array) for name, array in dictionary.arrays.items()}  # all processes have parts of an array
    with _quiet_absl():
        # As numpy arrays: with those of JAX, Orbax writes down their devices, and opens the folder on no others.
        ocp.save(folder / ARRAYS, arrays)
    facts = {name: _describe_array(array) for name, array in arrays.items()}
    if is_first_process():
        write_json(folder / DESCRIPTION, dict(config=to_json(dictionary.config), arrays=facts))


def read_config(folder: Path) -> DictionaryConfig:
    """Return the configuration of the dictionary in a folder, without reading its arrays."""
    saved = {**read_object(Path(folder) / DESCRIPTION, "config")["config"]}
    missing = [name for name in ("kind", "site", "d_in", "n_features") if name not in saved]
    if missing:
        raise UserError(f"{Path(folder) / DESCRIPTION} does not say {', '.join(missing)}: it is damaged")
    config = from_json(DictionaryConfig, {name: value for name, value in saved.items() if name not in _REMOVED})
    for name in ("d_in", "n_features"):
        tensors.positive_int(Path(folder) / DESCRIPTION, name, getattr(config, name))
    return config


def load(folder: Path, matmul_dtype: str = "float32", dtype: str = "float32") -> Dictionary:
    """Read what ``save`` wrote, and check shape, dtype and checksum of every array.

    Args:
      folder: holds ``dictionary.json``.
      matmul_dtype: dtype of the operands of matrix products.
      dtype: dtype of its matrices on the device, see ``tensors.Published.load``.
    """
    folder = Path(folder).absolute()
    config, description = read_config(folder), read_object(folder / DESCRIPTION, "arrays")
    with tensors.description_errors(folder / DESCRIPTION):
        # As numpy arrays: on the host, and in float64 where that is what was trained.
        target = {name: np.empty(facts["shape"], facts["dtype"]) for name, facts in description["arrays"].items()}
    process = jax.process_index()
    # Each process reads for itself. Orbax would have all wait for one another, and numbers such meetings by how often
    # each process has read and written: they would never meet again once one of them has read something alone.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"reader{process}"
    )
    try:
        with _quiet_absl(), ocp.Context(multiprocessing_options=alone):
            arrays = ocp.load(folder / ARRAYS, target)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged or missing checkpoint
        raise UserError(f"{folder / ARRAYS} cannot be restored ({type(error).__name__}): damaged or missing") from error
    for name in parameter_table(config):
        if name not in arrays or _describe_array(arrays[name]) != description["arrays"][name]:
            raise UserError(f"{folder / ARRAYS}: {name} does not match {DESCRIPTION}: the files are damaged")
    tensors.check_finite(folder / ARRAYS, arrays)
    # From the host, and so committed to no device: it goes with activations on whatever devices they are. Without
    # JAX_ENABLE_X64=1 float64 becomes float32 here.
    placed = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name in tensors.MATRICES if dtype != "auto" else ():
        if name in placed and (dtype == "bfloat16" or placed[name].dtype == jnp.bfloat16):
            placed[name] = placed[name].astype(dtype)
    with tensors.description_errors(folder / DESCRIPTION):
        return Dictionary(config, matmul_dtype, **placed)


def _describe_array(array: jax.Array | np.ndarray) -> dict:
    """Return shape, dtype and checksum of an array, as ``dictionary.json`` holds them."""
    host = np.ascontiguousarray(array)
    return dict(shape=list(host.shape), dtype=host.dtype.name, sha256=hashlib.sha256(host.data).hexdigest())

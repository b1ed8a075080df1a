"""The weight files of a checkpoint: which of them are read, which tensors they hold, and access to the values.

Files are chosen as transformers chooses them: ``model.safetensors`` before the shards of an index, and safetensors
before ``pytorch_model.bin``. What else lies in the folder, such as an old index, is without effect. Files that
``torch.save`` wrote (.bin, .pt, .pth) are unpickled here and nowhere else.
"""

import dataclasses
import functools
import importlib
import json
import math
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from saejax.errors import UserError
from saejax.wording import counted

_INDEX = ".index.json"
ADAPTER = "adapter_config.json"
# What transformers looks for, in this order.
WEIGHT_FILES = ("model.safetensors", "model.safetensors" + _INDEX, "pytorch_model.bin", "pytorch_model.bin" + _INDEX)
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
_UNKNOWN = np.dtype(np.void)
_STATE = ("state_dict", "model_state_dict", "model")  # names under which a training checkpoint nests its tensors
_LISTED = 10  # names that a message lists
_NUMBERED = re.compile(r"(?:[^.]+\.)*?(\d+)\.")  # the beginning of names of tensors of one layer
_COMPUTED = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|[._])inv_freq$|rotary_emb\.|position_ids$")
_OTHER_PARTS = re.compile("vision|visual|audio|image|multi_modal|speech|talker|2wav")  # than the language model
_PREDICTION = re.compile(r"mtp|nextn|\.(eh_proj|enorm|hnorm|shared_head)\.")
_LFS_POINTER = b"version https://git-lfs"
_FLOAT_DTYPES = {np.dtype(dtype) for dtype in _FLOATS.values()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, whose values are read when they are used."""

    file: Path  #: where it lies
    name: str  #: in that file
    shape: tuple[int, ...]  #: shape of the values, row-major
    dtype: np.dtype  #: dtype of the values; void where NumPy has none such, as of floats of 8 bits
    file_dtype: str  #: as the file calls it, such as "BF16" or "U8"
    _values: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes; 0 for dtypes that NumPy does not have."""
        return self.dtype.itemsize * math.prod(self.shape)

    def map(self) -> np.ndarray:
        """Return the values, mapped from the file: only what is used of them is read from disk.

        Raises:
          UserError: they are not floats.
        """
        if self.dtype_problem:
            raise UserError(f"{self.file}: tensor {self.name} {self.dtype_problem}")
        return self._values()

    def read(self) -> np.ndarray:
        """Return a copy of the values in float32, or in float64 if the file has that and JAX is set to keep it."""
        if not self.shape:  # single numbers lose nothing that counts
            return np.array(self._values(), np.float32)
        values = self.map()
        if values.dtype == np.float64:
            import jax  # capture by torch does without

            if jax.config.jax_enable_x64:
                return np.array(values)
        return np.array(values, np.float32)

    def rows(self, index_U: np.ndarray) -> np.ndarray:
        """Return some rows of the first axis, in the file's dtype; where values are mapped, only these are read."""
        return self.map()[index_U]

    def numbers(self) -> list[Any]:
        """Return the values of a small tensor of any dtype as Python's numbers, in one list."""
        return np.reshape(self._values(), -1).tolist()

    def column(self, index: int) -> "Tensor":
        """Return the tensor ``[:, index]``, whose values are read when they are used, too."""
        shape = (self.shape[0], *self.shape[2:])
        return dataclasses.replace(self, shape=shape, _values=lambda: self.map()[:, index])

    def part(self, index: tuple[slice, ...]) -> "Tensor":
        """Return the tensor of the values at an index, which are read when they are used, too."""
        shape = tuple(len(range(*of.indices(size))) for of, size in zip(index, self.shape, strict=True))
        return dataclasses.replace(self, shape=shape, _values=lambda: self.map()[index])

    @property
    def dtype_problem(self) -> str:
        """A message if the values are no floats, as in masks and quantised weights, else ""."""
        if self.dtype in _FLOAT_DTYPES:
            return ""
        return f"has dtype {self.file_dtype}, expected one of {', '.join(_FLOATS)}: use unquantised weights"


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of the checkpoint in a folder, by name; where two shards hold one name, the index decides.

    Raises:
      UserError: a file is missing, truncated or in another format.
    """
    index = _read_index(folder)
    tensors_of = {file.name: read_header(file) for file in weight_files(folder)}
    tensors = {name: tensor for in_file in tensors_of.values() for name, tensor in in_file.items()}
    if adapted := [name for name in tensors if ".lora_" in name]:
        raise UserError(
            f"{folder} holds weights with an adapter beside them ({adapted[0]}): merge it, and save the model"
        )
    return tensors | {name: tensors_of[file][name] for name, file in index.items() if name in tensors_of[file]}


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint that are read, one or the shards that an index names.

    Raises:
      UserError: there are none, or one is missing.
    """
    chosen = _chosen_file(folder)
    if chosen is None:
        raise UserError(f"{folder} has no weights{_describe_contents(folder)}")
    names = list_shards(folder) or [chosen]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}, which {chosen} names: fetch the model again")
    return [folder / name for name in names]


def check_no_adapter(folder: Path) -> None:
    """Raise a ``UserError`` if a folder holds an adapter: transformers may put it on weights beside it."""
    if (folder / ADAPTER).exists():
        raise UserError(f"{folder} holds an adapter ({ADAPTER}): merge it into its base model, and save that alone")


def find_unread(names: Iterable[str], n_layers: int) -> tuple[list[str], int]:
    """Return which tensors of a checkpoint, of those that are not read, could count for what a model computes.

    Masks and frequencies, which are computed, do not, nor do towers for images and sound, nor layers that predict
    further tokens (multi-token prediction), as DeepSeek-V3 and GLM-4.5 have behind all others.

    Args:
      names: of the tensors that are not read.
      n_layers: layers of the model.

    Returns:
      The names of those outside of layers, or in layers of the model; and the number of layers that the checkpoint has
      beyond the model's.
    """
    layer_of = {
        name: _NUMBERED.match(name) for name in names if not (_COMPUTED.search(name) or _OTHER_PARTS.search(name))
    }
    predicting = {match[0] if match else name for name, match in layer_of.items() if _PREDICTION.search(name)}
    left = {name: match for name, match in layer_of.items() if (match[0] if match else name) not in predicting}
    inside = [name for name, match in left.items() if not match or int(match[1]) < n_layers]
    return inside, len({match[1] for match in left.values() if match and int(match[1]) >= n_layers})


def warn_of_unread(folder: Path, names: Sequence[str], beyond: int, n_layers: int) -> None:
    """Log in a line each which tensors are not read, and how many layers; see ``find_unread``."""
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        logging.warning("%s holds weights that are not read: %s%s", folder, ", ".join(names[:_LISTED]), more)
    if beyond:
        logging.warning(
            "%s holds weights of %s beyond the %d that config.json says (num_hidden_layers): they are not read",
            *(folder, counted(beyond, "layer"), n_layers),
        )


def not_finite_error(what: str, names: Sequence[str], dtype: str) -> UserError:
    """Return the error for the tensors ``names`` of ``what``, such as "the weights in FOLDER", with NaN or infinity.

    ``dtype`` is that in which they were loaded, which may have a smaller range than the file's.
    """
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return UserError(
        f"{what} hold NaN or infinity in {dtype}: {', '.join(names[:_LISTED])}{more}; expected finite numbers: fetch "
        "the files again, or use others, as training may have diverged"
    )


def file_dtype(dtype: np.dtype) -> str:
    """Return the name of a dtype in safetensors files, such as "BF16"."""
    return next(name for name, of_name in (_FLOATS | _INTEGERS).items() if np.dtype(of_name) == dtype)


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of one that ``torch.save`` wrote, by name.

    Raises:
      UserError: the file is truncated or in another format.
    """
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name; their values are mapped when they are used."""
    from safetensors import SafetensorError, safe_open

    file.open("rb").close()  # an error that says why: safetensors' own would read as if it were damaged
    try:
        with safe_open(file, "numpy") as opened:  # it also checks that the values fill the file without gaps
            facts = {}
            for name in opened.offset_keys():
                part = opened.get_slice(name)
                facts[name] = (part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(_LFS_POINTER):
            raise UserError(f"{file} is a pointer of Git LFS, not the weights: run `git lfs pull` there") from None
        raise UserError(f"{file} is truncated or not a safetensors file ({error}): fetch it again") from None
    # Offsets are not told, but the values fill the file without gaps: they are counted from its end.
    tensors, end = {}, file.stat().st_size
    for name, (kind, shape) in reversed(facts.items()):
        bits = 8 if kind == "BOOL" else int(re.findall(r"\d+", kind)[0])
        end -= -(-bits * math.prod(shape) // 8)
        dtype = np.dtype(_FLOATS.get(kind) or _INTEGERS.get(kind, _UNKNOWN))
        tensors[name] = Tensor(file, name, shape, dtype, kind, functools.partial(_map_values, file, dtype, end, shape))
    return {name: tensors[name] for name in facts}


def _map_values(file: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Map a tensor's values; ``safe_open.get_tensor`` would copy all of them."""
    # A plain array on the map: slices of a memmap take ten times as long.
    return np.zeros(shape, dtype) if 0 in shape else np.asarray(np.memmap(file, dtype, "r", offset, shape))


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of ``torch.save`` by name."""
    loaded = read_pickled_tensors(file)
    if not isinstance(loaded, dict):
        raise UserError(f"{file} holds a {type(loaded).__name__}: expected tensors by name, as a state dict has them")
    # Only where no tensor lies beside it: a plain state dict may have a module of that name.
    nested = next((loaded[name] for name in _STATE if isinstance(loaded.get(name), dict)), None)
    if nested is not None and not any(isinstance(value, np.ndarray) for value in loaded.values()):
        loaded = nested
    tensors = {}
    for name, value in loaded.items():
        kind = str(getattr(value, "dtype", type(value).__name__))
        array = np.asarray(value) if isinstance(value, np.ndarray | float | int) else None
        dtype, shape = (_UNKNOWN, getattr(value, "shape", ())) if array is None else (array.dtype, array.shape)
        tensors[str(name)] = Tensor(file, str(name), tuple(shape), dtype, kind, functools.partial(np.asarray, value))
    return tensors


def _describe_contents(folder: Path) -> str:
    """Return what a folder without weights holds instead, and what is expected: the end of a message."""
    shards = sorted(file.name for pattern in ("model-*-of-*", "pytorch_model-*-of-*") for file in folder.glob(pattern))
    if shards:
        index = WEIGHT_FILES[1 if shards[0].startswith("model") else 3]
        return f" that can be read: {shards[0]} is a shard, and {index}, which names all of them, is missing: fetch it"
    return ": expected model.safetensors, or its shards with an index, or pytorch_model.bin"


def _chosen_file(folder: Path) -> str | None:
    """Return the name of the weight file or index that is read; None: there is none."""
    return next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def list_shards(folder: Path) -> list[str]:
    """Return the names of the files that the index in use names, whether they are there or not; [] without one."""
    return sorted(set(_read_index(folder).values()))


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file of every tensor; {} where all are in one file."""
    chosen = _chosen_file(folder)
    if chosen is None or not chosen.endswith(".index.json"):
        return {}
    file = folder / chosen
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        # Names without folders: an index must not make other files of the disk be read.
        if not weight_map or any(Path(name).name != name for name in weight_map.values()):
            raise ValueError("its weight_map has to name files of the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged or not an index of weight files ({error}): fetch it again") from None
    return weight_map


def read_pickled_tensors(file: Path, classes: Collection[str] = (), remedy: str = "") -> Any:
    """Read a file of ``torch.save`` without running any code that it holds.

    The file is mapped into memory: values are read from disk when they are used. (Files from before PyTorch 1.6 cannot
    be mapped and are read whole.)

    Args:
      file: a state dict, or another nest of dictionaries, lists and tuples with tensors in it.
      classes: full names of classes whose objects may be in it, too; they have to be installed.
      remedy: what to do where one of them is not installed.

    Returns:
      The same nest with plain dictionaries, and NumPy arrays in place of tensors. Arrays keep the dtype of the file,
      bfloat16 as ``ml_dtypes.bfloat16``; they share memory where tensors do, and must not be written to. Numbers and
      texts stay as they are.

    Raises:
      UserError: the file is missing, truncated, of another format, or holds other objects.
    """
    import torch

    if not file.is_file():
        raise UserError(f"{file} is missing: fetch it again")
    file.open("rb").close()  # likewise
    try:
        with torch.serialization.safe_globals(_named_classes(file, classes, remedy)):
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                loaded = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
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


def _named_classes(file: Path, classes: Collection[str], remedy: str) -> list[Any]:
    """Return those of some classes of which a file has objects.

    Raises:
      UserError: one is not installed.
    """
    import torch

    installed = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(file) if classes else ():
        module, _, own_name = name.rpartition(".")
        if name in classes:
            try:
                installed.append(getattr(importlib.import_module(module), own_name))
            except (ImportError, AttributeError):
                raise UserError(f"{file} holds an object of {name}, which is not installed: {remedy}") from None
    return installed


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

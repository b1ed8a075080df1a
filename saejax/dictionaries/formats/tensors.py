"""Tensors of published dictionaries: opened without reading values, checked against a layout, and written whole.

A *layout* maps names of arrays here to names of tensors in a file; ``.T`` at the end of a name says that the file
stores the transpose:

    {"W_enc_DxF": "encoder.weight.T", "b_enc_F": "encoder.bias", ...}

Tensors that no layout names are never a reason to refuse a file.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.modules import Dictionary, DictionaryConfig, parameter_table, placements
from saejax.errors import UserError, one_of
from saejax.files import read_foreign, unfinished_folder
from saejax.models.checkpoint import Tensor, file_dtype, not_finite_error, read_header
from saejax.parallel.collectives import host_pieces, local_parts
from saejax.parallel.mesh import read_parts

DTYPES = ("float32", "bfloat16", "auto")  # of the matrices of a dictionary that is loaded
MATRICES = ("W_enc_DxF", "W_dec_FxD", "W_skip_DxD")
PICKLED = (".pt", ".pth", ".bin")
_WRAPPERS = ("_orig_mod.", "module.")  # before the names of models that were compiled, or run on several devices
_LISTED = 12  # names of tensors that a message lists
_STAMP = "saejax_stamp"  # key of a file's metadata

Layout = Mapping[str, str]
Fold = Callable[[Arrays], Arrays]


@dataclasses.dataclass(frozen=True)
class Published:
    """A dictionary in another tool's files: its configuration, where its tensors are, how they become ours."""

    config: DictionaryConfig  #: what it is
    #: the tensors of ``modules.parameter_table``, by our names; without a bias it has none, and it is 0.
    tensors: Mapping[str, Tensor]
    transposed: frozenset[str] = frozenset()  #: our names of tensors that are stored transposed
    #: makes our arrays of those in the files (which may have further names); None: they are the same.
    fold: Fold | None = None

    def load(self, matmul_dtype: str = "float32", dtype: str = "float32", mesh: Mesh | None = None) -> Dictionary:
        """Read the dictionary.

        Args:
          matmul_dtype: dtype of the operands of matrix products.
          dtype: dtype of its matrices on the device, of ``DTYPES``; "auto": bfloat16 where the files are, else float32.
            Biases and thresholds are float32.
          mesh: the devices; without a fold, of an array no more is read at once than the part of one. None: as for
            ``load_dictionary``.
        """
        names = tuple(parameter_table(self.config))
        if not self.fold:
            return Dictionary(self.config, matmul_dtype, **self._place({}, names, dtype, mesh))
        with description_errors(next(iter(self.tensors.values())).file.parent):
            arrays = self.fold({name: self._read(name) for name in self.tensors})
            return Dictionary(self.config, matmul_dtype, **self._place(arrays, names, dtype, mesh))

    def load_encoder(self) -> dict[str, jax.Array] | None:
        """Read all arrays but the decoder's rows, in the files' dtype; None where folding needs these. See ``load``."""
        names = tuple(name for name in parameter_table(self.config) if name != "W_dec_FxD")
        return None if self.fold else self._place({}, names, "auto", None)

    def _place(
        self, arrays: Mapping[str, np.ndarray], names: tuple[str, ...], dtype: str, mesh: Mesh | None
    ) -> dict[str, jax.Array]:
        """Return the arrays of some names on the devices, read from the file unless given; 0 where it has none."""
        one_of(dtype, DTYPES, "dtype")
        narrow = dtype == "bfloat16" or (dtype == "auto" and self.tensors["W_enc_DxF"].dtype == jnp.bfloat16)
        table, where = parameter_table(self.config), placements(self.config, mesh) if mesh else {}
        damaged: list[str] = []

        def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
            """Return a part of an array; a threshold for all features is one for each."""
            shape, _ = table[name]
            if not arrays and name in self.tensors:
                part = self._read(name, index if self.tensors[name].shape else None)
            else:
                part = np.broadcast_to(arrays[name], shape)[index] if name in arrays else np.zeros((), np.float32)
            if not _is_finite(name, part):
                damaged.append(name)
            # Biases and thresholds stay in float32: rounded, they would let other features fire.
            target = jnp.bfloat16 if narrow and name in MATRICES else jax.dtypes.canonicalize_dtype(part.dtype)
            size = [len(range(*of.indices(length))) for of, length in zip(index, shape, strict=True)]
            return np.broadcast_to(part.astype(target, copy=False), size)

        whole = (slice(None), slice(None))
        placed = {
            name: read_parts(table[name][0], where[name], functools.partial(read, name))
            if mesh
            else jnp.asarray(read(name, whole[: len(table[name][0])]))
            for name in names
        }
        _refuse_damaged(next(iter(self.tensors.values())).file, damaged)
        return placed

    def directions(self, name: str, feature_U: np.ndarray) -> np.ndarray:
        """Return rows of "W_dec" or columns of "W_enc", the ``name``, of a ``feature`` each, [U, D]; without a fold."""
        name = {"W_enc": "W_enc_DxF", "W_dec": "W_dec_FxD"}[name]
        tensor = self.tensors[name]
        # What a feature reads is a column of W_enc; files that store the transpose have it as a row.
        if (name == "W_dec_FxD") != (name in self.transposed):
            return tensor.rows(feature_U)
        return tensor.read()[:, feature_U].T

    def _read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return our array of a name, or a part of it, as the file has it, transposed where it is stored so."""
        is_transposed, tensor = name in self.transposed, self.tensors[name]
        if index is not None:
            tensor = tensor.part(index[::-1] if is_transposed else index)
        return tensor.read().T if is_transposed else tensor.read()


def open_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name: safetensors, npz, or one of ``torch.save``.

    Prefixes that ``torch.compile`` and ``DataParallel`` put before every name are left out.

    Raises:
      UserError: it is missing, truncated, or not of the format that its name says.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: fetch the dictionary again")
    file.open("rb").close()  # an error that says why, such as of a file without permission
    state = _open_npz(file) if file.suffix == ".npz" else read_header(file)
    # Again and again: a model that was compiled may also have run on several devices.
    while prefix := next((prefix for prefix in _WRAPPERS if state and all(n.startswith(prefix) for n in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _open_npz(file: Path) -> dict[str, Tensor]:
    """Return the arrays of a npz file by name, without reading their values."""

    def load(name: str) -> np.ndarray:
        """Read an array from the zip file, of which no part can be read alone."""
        with _npz_errors(file), np.load(file, allow_pickle=False) as opened:  # a zip file: arrays are read whole
            return opened[name]

    tensors = {}
    with _npz_errors(file), zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                version, name = np.lib.format.read_magic(stream), member.removesuffix(".npy")
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(stream)
                tensors[name] = Tensor(file, name, shape, dtype, dtype.name, functools.partial(load, name))
    return tensors


@contextlib.contextmanager
def _npz_errors(file: Path) -> Iterator[None]:
    """Turn the errors of a damaged file into a ``UserError``."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, ValueError, LookupError, EOFError, OSError, NotImplementedError) as error:
        raise UserError(f"{file} is truncated or not a npz file ({error}): fetch it again") from None


def arrange(
    file: Path, state: Mapping[str, Tensor], layout: Layout, config: DictionaryConfig | None = None
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return the tensors that a layout names, by our names, and which of these are stored transposed.

    Shapes are compared with the ``config``'s, if there is one. ``state`` are all tensors of the file.

    Raises:
      UserError: tensors are missing or of other shapes; all are listed. Or k is larger than the number of features.
    """
    if config and config.k > config.n_features:
        count = config.n_features
        raise UserError(f"{file} has {count} features, k is {config.k}: expected a whole number from 1 to the {count}")
    plain = {ours: name.removesuffix(".T") for ours, name in layout.items()}
    transposed = frozenset(ours for ours, name in layout.items() if name.endswith(".T"))
    missing = sorted(name for name in plain.values() if name not in state)
    if missing:
        has = list_names(state) or "nothing"
        raise UserError(f"{file} lacks {', '.join(missing)}: it has {has}; fetch the dictionary again")
    wrong = []
    for ours, (shape, _) in parameter_table(config).items() if config else ():
        stored = shape[::-1] if ours in transposed else shape
        accepted = (stored, ()) if ours == "threshold_F" else (stored,)  # some have one threshold for all features
        if ours in plain and state[plain[ours]].shape not in accepted:
            wrong.append(f"{plain[ours]} has the shape {state[plain[ours]].shape}, expected {stored}")
    if wrong:
        raise UserError(f"{file} does not fit its description: {'; '.join(wrong)}")
    return {ours: state[name] for ours, name in plain.items()}, transposed


def list_names(state: Mapping[str, Any]) -> str:
    """Return the names of tensors, of many the first, as a message lists them."""
    names = sorted(state)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def sizes(file: Path, state: Mapping[str, Tensor], layout: Layout, any_output: bool = False) -> tuple[int, int, int]:
    """Return the width that is read, the number of features F, and the width that is written, from both matrices.

    Raises:
      UserError: there is no encoder, or the decoder is of another width and that is not ``any_output``.
    """
    tensors, transposed = arrange(file, state, {name: layout[name] for name in ("W_enc_DxF", "W_dec_FxD")})
    shapes = {name: tensor.shape[::-1] if name in transposed else tensor.shape for name, tensor in tensors.items()}
    if any(len(shape) != 2 for shape in shapes.values()):
        shapes_text = ", ".join(f"{layout[name].removesuffix('.T')} {tensors[name].shape}" for name in tensors)
        raise UserError(f"{file} has no encoder and decoder matrix: its shapes are {shapes_text}")
    (width, features), (_, written) = shapes["W_enc_DxF"], shapes["W_dec_FxD"]
    if written != width and not any_output:
        raise UserError(
            f"{file} reads width {width} and writes width {written}: expected one width, except of a transcoder in "
            "SAELens' layout"
        )
    return width, features, written


def check_finite(file: Path, arrays: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Raise a ``UserError`` if arrays hold NaN or infinity. A threshold may be infinite: its feature never fires.

    Of arrays that are split over processes each looks at its own parts.
    """
    finite = {name: all(_is_finite(name, part) for _, part in local_parts(array)) for name, array in arrays.items()}
    _refuse_damaged(file, [name for name, is_finite in finite.items() if not is_finite])


def _refuse_damaged(file: Path, names: Sequence[str]) -> None:
    """Raise a ``UserError`` that lists arrays with NaN or infinity, if there are any."""
    if names:
        listed = [name.rpartition("_")[0] for name in dict.fromkeys(names)]
        raise not_finite_error(f"the dictionary's arrays in {file}", listed, "float32")


def _is_finite(name: str, array: np.ndarray) -> bool:
    # The sum of finite weights does not overflow float32, and unlike ``isfinite`` it needs no array of its own.
    if np.isfinite(np.sum(array, dtype=np.float32)):
        return True
    allowed = np.isposinf(array) if name == "threshold_F" else False
    return bool((np.isfinite(array) | allowed).all())


def describe(
    file: Path, state: Mapping[str, Tensor], layout: Layout, fold: Fold | None = None, **facts: Any
) -> Published:
    """Return the dictionary whose tensors, the ``state`` of a file, a layout names; for ``fold`` see ``Published``.

    ``facts`` are fields of ``DictionaryConfig`` besides its sizes and ``skip``, which the tensors tell.

    Raises:
      UserError: tensors are missing or of other shapes, or k is larger than the number of features.
    """
    width, features, _ = sizes(file, state, layout)
    config = DictionaryConfig(d_in=width, n_features=features, skip="W_skip_DxD" in layout, **facts)
    return Published(config, *arrange(file, state, layout, config), fold)


def read_settings(file: Path) -> dict[str, Any]:
    """Return the settings of a JSON file that holds an object."""
    return read_foreign(file, "the description of a dictionary")


@contextlib.contextmanager
def description_errors(place: Path) -> Iterator[None]:
    """Turn what a setting of a wrong type makes of the code that reads it into a ``UserError`` about ``place``."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{place} has a setting of another type than its format has ({reason}): fetch its description again"
        ) from error


def flag(file: Path, settings: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return the setting ``name`` of a file, true or false, or the default without it; a ``UserError`` for others."""
    value = settings.get(name)
    if value is not None and value not in (True, False):  # "false" is a text, which Python takes for true
        raise UserError(f"{file}: {name} is {value!r}: expected true or false")
    return default if value is None else bool(value)


def positive_int(file: Path, name: str, value: Any) -> int:
    """Return the value of a file's setting of this name, a whole number above 0; a ``UserError`` for any other."""
    if isinstance(value, float) and value.is_integer():  # some tools write 32.0
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {name} is {value!r}: expected a whole number above 0")
    return value


def write(file: Path | None, arrays: Mapping[str, np.ndarray | jax.Array], stamp: str = "") -> None:
    """Write arrays by name, row by row, in the format safetensors.

    Parts that are on several devices go into the file one after the other, so that no host has a whole array.

    Args:
      file: the file, made anew; None: another process writes it, and this one only gives its parts.
      arrays: the arrays; where they are split over processes, all call this together.
      stamp: says which files belong together, see ``stamp_of``.
    """
    # Wide numbers first: each array then begins at a multiple of its numbers' size, wherever the header ends.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = dict(__metadata__={_STAMP: stamp}) if stamp else {}
    ends = [0, *itertools.accumulate(array.nbytes for _, array in ordered)]
    for (name, array), start, end in zip(ordered, ends, ends[1:], strict=False):
        header[name] = dict(dtype=file_dtype(array.dtype), shape=list(array.shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if file is not None:
        with open(file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.flush()
            _reserve(opened.fileno(), 8 + len(text) + ends[-1])
    for (_, array), start in zip(ordered, ends, strict=False):
        where = 8 + len(text) + start
        target = np.memmap(file, array.dtype, "r+", where, array.shape) if file is not None and array.nbytes else None
        for index, piece in host_pieces(array):
            if target is not None:
                target[index] = piece


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size on disk: written to through memory, a full disk would end the process without a word."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def stamp_of(file: Path) -> str:
    """Return the stamp of a file that ``open_tensors`` has looked at; "": it has none."""
    with safe_open(file, "numpy") as opened:
        return (opened.metadata() or {}).get(_STAMP, "")


def require_folder(folder: Path) -> None:
    """Raise a ``UserError`` if a path that should be a folder is a file, or is inside of one."""
    if file := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"{file} is a file: name a folder")


@contextlib.contextmanager
def whole_folder(folder: Path, description: str, *patterns: str) -> Iterator[Path]:
    """Yield a folder to write to; its files appear in ``folder`` if the block succeeds, the ``description`` last.

    Without the description nobody reads the folder.

    Raises:
      UserError: the folder holds a description, or files of the ``patterns``, already.
    """
    folder = Path(folder)
    require_folder(folder)
    present = [path.name for pattern in (description, *patterns) for path in sorted(folder.glob(pattern))]
    if present:
        raise UserError(f"{folder} already holds {present[0]}: delete it or name another folder")
    with unfinished_folder(folder) as unfinished:
        yield unfinished
        for path in sorted(unfinished.iterdir(), key=lambda path: (path.name == description, path.name)):
            # On disk before it gets its name: after a crash, what has its name is whole.
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)

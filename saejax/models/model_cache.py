"""The cache of models that saejax made of others, in the hub's format.

They are kept in ``identity.cache_folder()``, each in a folder that appears whole or not at all and is used only while
its content is what was written.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.files import locked, read_json, write_json
from saejax.models.identity import MARK, cache_folder, fingerprint

_LOADING = ("local_files_only", "is_local")


def cached_model(name: str, origin: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of a model from the cache, or make it now.

    Args:
      name: name of its folder; names all that its content depends on.
      origin: what it is made of, noted in the folder.
      make: writes its files into an empty folder; raises ``OSError`` where there is no room.

    Raises:
      UserError: the cache cannot be written; and what ``make`` raises.
    """
    folder = cache_folder() / name
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not _is_whole(folder):  # another process may have made it meanwhile
                _make(folder, origin, make)
    except OSError as error:
        raise UserError(
            f"the model cache {cache_folder()} cannot be written ({error.strerror or error}): set SAEJAX_CACHE to a "
            "writable folder with room for the model"
        ) from None
    return folder


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model and its tokenizer of the transformers library in the hub's format.

    Raises:
      OSError: there is no room.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from None
    tokenizer.save_pretrained(folder)
    # transformers saves with the tokenizer how it was loaded, such as whether the hub could be reached.
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    write_json(path, {name: value for name, value in settings.items() if name not in _LOADING})


def _is_whole(folder: Path) -> bool:
    """Return whether the folder holds what was written into it."""
    if not folder.is_dir():
        return False
    try:
        return json.loads((folder / MARK).read_text())["fingerprint"] == fingerprint(folder)
    except (OSError, ValueError, KeyError, UserError):
        return False


def _make(folder: Path, origin: str, make: Callable[[Path], None]) -> None:
    """Make a model in a temporary folder, which takes its place when it is whole."""
    writing = folder.with_name(f".{folder.name}.writing")
    for leftover in (writing, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    writing.mkdir()
    try:
        make(writing)
        write_json(writing / MARK, dict(origin=origin, fingerprint=fingerprint(writing)))
        # On disk before the rename: after a crash, a folder that looks whole has to be whole.
        for path in (path for path in writing.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(writing, folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)

"""The cache of models that saejax made of others, in the hub's format.

They are kept in ``identity.cache_folder()``, each in a folder that appears whole or not at all and is used only while
its content is what was written.

A model with random weights in place of its own is the control for what features owe to training: published dictionaries
of such models score on some measures nearly as well as dictionaries of trained models (Heap et al., 2025, arXiv
2501.17727).
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.files import locked, read_json, write_json
from saejax.models.identity import cache_folder, content_sha256, settings_fingerprint
from saejax.models.tokenizer_files import LOCAL, read_tokenizer

_MARK = "saejax.json"  # left in each folder; not part of the model
_LOADING = ("local_files_only", "is_local", "trust_remote_code")
_ERROR = 300  # characters of another library's error in a message
_SEED, _MAKING = 0, 3  # of random weights; raise _MAKING when what is made changes


def cached_model(name: str, origin: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of a model from the cache, or make it now.

    Args:
      name: name of its folder; names all that its content depends on.
      origin: origin of the model, noted in the folder.
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


def first_words(error: Exception) -> str:
    """Return the beginning of an error's text: transformers lists all its classes where one is missing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _ERROR else f"{text[:_ERROR]} ..."


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
        files = json.loads((folder / _MARK).read_text())["files"]
        return all(content_sha256(folder / name) == content for name, content in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # the mark, too, may be damaged
        return False


def _files(folder: Path) -> list[Path]:
    """Return the files in a folder and in those below it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _mark(folder: Path, origin: str) -> None:
    """Leave in a folder where its model is from, and what each file holds.

    These are hashes of whole files, not the model's fingerprint: that changes with the version of saejax that computes
    it, and another version which reads the cache at the same time must not find the folder damaged and make it anew.
    """
    files = {str(path.relative_to(folder)): content_sha256(path) for path in _files(folder)}
    write_json(folder / _MARK, dict(origin=origin, files=files))


def _make(folder: Path, origin: str, make: Callable[[Path], None]) -> None:
    """Make a model in a temporary folder, which takes its place when it is whole."""
    writing = folder.with_name(f".{folder.name}.writing")
    for leftover in (writing, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    writing.mkdir()
    try:
        make(writing)
        _mark(writing, origin)
        # On disk before the rename: after a crash, a folder that looks whole has to be whole.
        for path in _files(writing):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(writing, folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def draw_random_model(folder: Path) -> Path:
    """Return the model of ``folder``, with its configuration and tokenizer and with weights as transformers draws them.

    Args:
      folder: in the hub's format; its weights are not read and need not be there.

    Raises:
      UserError: transformers does not know the architecture, or the cache cannot be written.
    """
    name = f"random-{_SEED}-{settings_fingerprint(folder)}-{_MAKING}"
    return cached_model(name, f"random weights, seed {_SEED}", lambda target: _draw(folder, target))


def _draw(folder: Path, target: Path) -> None:
    """Save the model that transformers initialises for a configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        tokenizer = read_tokenizer(folder)
        # A generator of its own: the draws of the caller's program stay as they were.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    except Exception as error:  # an unusual configuration makes its reader raise anything
        raise UserError(
            f"transformers cannot make a random model of {folder} ({first_words(error)}): use another model"
        ) from error
    save_pretrained(model, tokenizer, target)

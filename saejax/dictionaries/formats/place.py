"""Where a dictionary is: a folder here, or one of a repository of the hub, fetched when it is first asked for."""

import functools
import os
import re
from pathlib import Path

from saejax.dictionaries.formats import llama_scope, own, qwen_scope
from saejax.errors import UserError
from saejax.models import hub

_ADDRESS = re.compile(r"hf:/+(?P<repository>[^/@]+/[^/@]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>.+))?")
_FILES = ("*.json", "*.yaml", "*.safetensors", "*.npz")


def located(path: str | os.PathLike) -> Path:
    """The folder that a name means.

    Args:
      path: a folder, or hf://ORG/NAME[/FOLDER][@REVISION], such as hf://google/gemma-scope-2b-pt-res/layer_12/
        width_16k/average_l0_82. Of a repository only that folder's own files are fetched, and what is in it only where
        it is of our own format or Llama Scope's. Of Qwen-Scope a file is named: hf://ORG/NAME/layer3.sae.pt.

    Raises:
      UserError: the address is none, or the hub has no such repository or revision, or cannot be reached.
    """
    return _fetched(os.fspath(path)) if os.fspath(path).startswith("hf:/") else Path(path)


@functools.lru_cache
def _fetched(address: str) -> Path:
    named = _ADDRESS.fullmatch(address)
    if not named:
        raise UserError(f"{address} names no folder on the hub: expected hf://ORG/NAME[/FOLDER][@REVISION]")
    repository, revision = named["repository"], named["revision"] or "main"
    fetch = functools.partial(hub.hub_folder, repository, revision, what="dictionary")
    if qwen_scope.is_one(file := Path(named["folder"] or "")):
        return fetch([file.as_posix(), file.with_name(qwen_scope.DESCRIPTION).as_posix()]) / file
    prefix = f"{named['folder']}/" if named["folder"] else ""
    root = fetch([prefix + file for file in _FILES], [f"{prefix}*/*"])
    if (root / prefix / own.DESCRIPTION).exists():
        root = fetch([f"{prefix}*"])
    elif (root / prefix / llama_scope.DESCRIPTION).exists():
        root = fetch([prefix + llama_scope.WEIGHTS])
    return root / prefix

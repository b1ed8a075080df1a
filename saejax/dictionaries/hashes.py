"""Hashes of dictionaries in files."""

import hashlib
import os
from pathlib import Path

from saejax.dictionaries.formats.circuit_tracer import ENCODERS
from saejax.dictionaries.formats.place import BESIDE, registry_overrides, resolve_path
from saejax.errors import UserError
from saejax.models.identity import content_sha256

# The first holds checksums of its arrays.
_HASHED = (
    *("dictionary.json", "cfg.json", "config.json", "config.yaml", "hyperparams.json"),
    *("*.safetensors", "*.npz", "*.pt", "*.pth"),
)


def hash_dictionaries(folder: str) -> str:
    """Hash the dictionaries in a folder, or a file, which may be on the hub: 16 hexadecimal digits.

    Raises:
      UserError: it does not exist.
    """
    digest, place = hashlib.sha256(), resolve_path(folder).absolute()  # "." has no name
    if not place.exists():  # nothing would have a hash, too
        raise UserError(f"{folder} does not exist: expected the folder of a dictionary")
    files = [place] if place.is_file() else _hashed_files(place)
    # Where a file is named, its settings are in another one beside it, or above.
    settings = [*(place.with_name(name) for name in BESIDE), place.parent.parent / "config.json"]
    settings = settings if place.is_file() else []
    # What SAELens' registry says of a dictionary is in none of its files.
    digest.update(repr(sorted(registry_overrides(folder).items())).encode())
    for path in [*files, *filter(Path.is_file, settings)]:
        digest.update(f"{os.path.relpath(path, place)} {content_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def _hashed_files(folder: Path) -> list[Path]:
    """Return the files in a folder, and in the members that a stack links to, that say what dictionaries it holds."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        # Not what was saved midway, which users may delete.
        if (Path(place) / "dictionary" / "dictionary.json").exists():
            folders[:] = ["dictionary"]
        elif ENCODERS.format(0) in names:  # a cross-layer transcoder
            folders[:] = []
        files += [Path(place) / name for name in names]
    return sorted(path for path in files if any(path.match(pattern) for pattern in _HASHED))

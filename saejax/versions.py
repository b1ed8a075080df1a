"""Versions of the packages that results depend on, and the hash of this one's code."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path

_PACKAGES = ("saejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "torch", "numpy")


@functools.cache  # every unit of a run asks, and each time ten files would be parsed
def package_versions() -> dict[str, str]:
    """Return the installed versions of what results depend on."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@functools.cache  # a tenth of the time of one small figure, but every unit of a plan may ask
def hash_code() -> str:
    """Return a hash of all files of this package, on which pages depend that the whole of it writes."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    for folder, folders, names in os.walk(package):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]

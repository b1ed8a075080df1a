"""Versions of the packages that results depend on."""

import contextlib
import functools
import importlib.metadata

_PACKAGES = ("saejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "torch", "numpy")


@functools.cache  # every unit of a run asks, and each time ten files would be parsed
def package_versions() -> dict[str, str]:
    """Return the installed versions of what results depend on."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions

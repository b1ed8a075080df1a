"""Plugins: Python files that a user names with ``--plugins`` and that register kinds when they are run."""

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from saejax.dictionaries import kinds
from saejax.dictionaries.kinds.settings import KIND_SETTINGS
from saejax.errors import UserError


def load(files: Sequence[str | Path]) -> None:
    """Run each file and record its hash with the settings of the kinds that it registers.

    Raises:
      UserError: a file is missing, fails, or registers nothing; one line names it and says why.
    """
    for file in map(Path, files):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"--plugins={file} cannot be read: {error.strerror}") from None
        source = hashlib.sha256(content).hexdigest()
        before = dict(kinds.KINDS)
        _run(file, f"saejax_plugin_{source[:16]}")
        added = [name for name, kind in kinds.KINDS.items() if before.get(name) is not kind]
        if not added:
            raise UserError(
                f"--plugins={file} registers no kind: decorate its class with saejax.dictionaries.kinds.register"
            )
        for name in added:
            KIND_SETTINGS[name] = dataclasses.replace(KIND_SETTINGS[name], source=source)


def _run(file: Path, name: str) -> None:
    """Run a file as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugins={file} is no Python file: expected a name that ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where its dataclasses look for their types
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--plugins={file} cannot be run: {type(error).__name__}: {error}") from error

"""saejax: which internal features a language model computes with, and whether they cause its answers.

The names stand in ``__init__.pyi``, where editors and type checkers read them. Each is loaded when it is
first used, so that ``import saejax`` is quick and starts no device. It adds one flag to XLA_FLAGS; see
``saejax/xla.py``.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

from saejax.xla import avoid_wrong_programs as _avoid_wrong_programs

_avoid_wrong_programs()
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))
_HOMES = {
    alias.name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names
}
__all__ = list(_HOMES)
__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *_HOMES])

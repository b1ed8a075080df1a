"""saejax: which internal features a language model computes with, and whether they cause its answers.

The names below are loaded when they are first used, so that ``import saejax`` is quick and starts no device.
"""

import importlib
from typing import Any

_HOMES = {
    "load_model": "saejax.models.language_model",
    "load_dictionary": "saejax.dictionaries",
    "load_results": "saejax.results",
    "load_transcoders": "saejax.dictionaries",
    "save_dictionary": "saejax.dictionaries",
    "save_transcoders": "saejax.dictionaries",
    "SiteEdit": "saejax.models.site_edits",
    "trace": "saejax.attribution.trace.prompt",
    "trace_gradient": "saejax.attribution.trace.gradient",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""Representations that fit on a screen, for objects that hold arrays or hundreds of figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

_LINES, _WIDTH, _ITEMS, _TEXT = 24, 110, 4, 60

_Class = TypeVar("_Class", bound=type)


def has_short_repr(cls: _Class) -> _Class:
    """Give a dataclass a representation of at most a screen, unless it defines one: a decorator."""
    if hasattr(cls.__repr__, "__wrapped__"):  # the one that dataclasses make
        cls.__repr__ = short_repr  # type: ignore[assignment]
    return cls


def short_repr(value: Any) -> str:
    """Return a dataclass as its name and a line for each field that is in its repr; at most a screen."""
    fields = [field.name for field in dataclasses.fields(value) if field.repr]
    line = f"{type(value).__name__}({', '.join(f'{name}={_brief(getattr(value, name))}' for name in fields)})"
    if len(line) <= _WIDTH:
        return line
    lines = [_cut(f"  {name}={_brief(getattr(value, name))},", _WIDTH) for name in fields]
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], f"  ... and {len(lines) - _LINES} more fields"]
    return "\n".join([f"{type(value).__name__}(", *lines, ")"])


def _brief(value: Any, depth: int = 2) -> str:
    """Return a value in a few words: arrays by their dtype and shape, the first items of what has many."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and tuple(value.shape):
        return f"<{value.dtype} {list(value.shape)}>"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return repr(_cut(value, _TEXT))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.repr]
        inside = _items([f"{name}={_brief(getattr(value, name), depth - 1)}" for name in names]) if depth else "..."
        return f"{type(value).__name__}({inside})"
    if isinstance(value, Mapping):
        inside = _items([f"{name!r}: {_brief(item, depth - 1)}" for name, item in value.items()]) if depth else "..."
        return f"{{{inside}}}"
    if isinstance(value, Sequence):
        return f"[{_items([_brief(item, depth - 1) for item in value[: _ITEMS + 1]], len(value)) if depth else '...'}]"
    return _cut(" ".join(repr(value).split()), _WIDTH)


def _items(items: Sequence[str], count: int = 0) -> str:
    """Return the first of ``count`` items, and how many there are; 0: as many as are given."""
    count = count or len(items)
    return ", ".join(items[:_ITEMS]) + (f", ... ({count})" if count > _ITEMS else "")


def _cut(text: str, width: int) -> str:
    """Return a text, cut to a width."""
    return text if len(text) <= width else f"{text[: width - 4]} ..."

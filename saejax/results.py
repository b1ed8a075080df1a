"""Results of the stages as classes: frozen dataclasses to JSON and back, and the results of finished units.

A stage returns a frozen dataclass; its summary's ``results`` are the JSON of it, a key for each field, and are read
back as the same class. Fields may be bool, int, float, str, ``Literal``, None where something is not defined (JSON has
no NaN), other such classes, tuples, and mappings by name or number. A field whose default is None is there on request
only: it is left out of the file when it is None. Everything else must be in the file, and nothing else may.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from saejax.errors import UserError
from saejax.short_reprs import has_short_repr

if TYPE_CHECKING:
    from jax.sharding import Mesh

T = TypeVar("T")
Settings = Mapping[str, Mapping[str, Any]]  # group -> field -> value


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval, bootstrap over prompts or items unless something else is said."""

    mean: float  #: the statistic of the values themselves, usually their mean
    low: float  #: lower end of the interval
    high: float  #: upper end of the interval

    def __mul__(self, factor: float) -> "Interval":
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that a unit ran on."""

    count: int  #: of devices
    kinds: tuple[str, ...]  #: their names, each once
    processes: int  #: how many


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """A mesh."""

    devices: int  #: number of devices
    kinds: tuple[str, ...]  #: kinds of device, each once
    axes: Mapping[str, int]  #: size of each axis
    processes: int  #: number of processes

    @classmethod
    def of(cls, mesh: "Mesh", processes: int) -> "MeshShape":
        """Return a summary's description of a mesh."""
        kinds = sorted({device.device_kind for device in mesh.devices.flat})
        return cls(mesh.devices.size, tuple(kinds), dict(mesh.shape), processes)


def to_json(value: Any) -> Any:
    """Return a result, or a part of one, as plain JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.default is not None or getattr(value, field.name) is not None
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], data: Any, source: str | Path, field: str = "") -> T:
    """Return the result that ``to_json`` wrote.

    Args:
      cls: its class, or another type that a field may have.
      data: the JSON data; a value that already has its class is kept as it is.
      source: the file that it was read from, for messages.
      field: its position in the file, for messages.

    Raises:
      UserError: a field is missing, unknown or of another type.
    """
    try:
        return _read(cls, data, field)
    except _Unfit as unfit:
        raise UserError(
            f"{source} {unfit}: it is damaged or was written by another version; delete its folder and run the stage "
            "again"
        ) from None


class _Unfit(Exception):
    """Data that do not fit a type; the message says which field, and why."""


def _read(hint: Any, data: Any, field: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, data, field)
    if origin is Literal and data in arguments:
        return data
    if dataclasses.is_dataclass(hint):
        return data if isinstance(data, typing.cast(type, hint)) else _read_fields(hint, data, field)
    if origin in (dict, Mapping) and isinstance(data, Mapping):
        key, value = arguments
        return {key(name): _read(value, item, f"{field}.{name}") for name, item in data.items()}
    if origin in (tuple, Sequence) and isinstance(data, list | tuple):
        every = arguments[:1] * len(data) if arguments[-1] is ... or origin is Sequence else arguments
        if len(every) == len(data):
            return tuple(_read(element, item, f"{field}[{i}]") for i, (element, item) in enumerate(zip(every, data)))
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if hint in (int, str, bool, types.NoneType) and type(data) is hint:
        return data
    raise _Unfit(f"has {data!r:.60} in {field or 'it'}, expected {getattr(hint, '__name__', hint)}")


def _read_union(choices: Sequence[Any], data: Any, field: str) -> Any:
    """Read as the first type that fits; among classes alone, as the one whose field names match best."""
    if data is None and types.NoneType in choices:
        return None
    left = [choice for choice in choices if choice is not types.NoneType]
    if isinstance(data, Mapping) and all(map(dataclasses.is_dataclass, left)):
        return _read(min(left, key=lambda choice: len(set(_hints(choice)) ^ set(data))), data, field)
    for choice in left[:-1]:
        try:
            return _read(choice, data, field)
        except _Unfit:
            continue
    return _read(left[-1], data, field)


def _read_fields(cls: Any, data: Any, field: str) -> Any:
    inside = f"{field}." if field else ""
    if not isinstance(data, Mapping):
        raise _Unfit(f"has {data!r:.60} in {field or 'it'}, expected the fields of {cls.__name__}")
    hints = _hints(cls)
    for name in data:
        if name not in hints:
            raise _Unfit(f"has a field {inside}{name} that is unknown")
    for entry in dataclasses.fields(cls):
        if entry.name not in data and entry.default is not None:
            raise _Unfit(f"has no field {inside}{entry.name}")
    return has_short_repr(cls)(**{name: _read(hints[name], item, f"{inside}{name}") for name, item in data.items()})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)

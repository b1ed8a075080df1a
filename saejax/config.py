"""Configuration: frozen dataclasses that validate themselves, and the flags made from them.

A *group* is one frozen dataclass, such as ``TrainConfig``, named after its class, ``train``. Each of
its fields is made with ``setting`` and becomes the flag ``--train.<field>``. Field types are str, int,
float, bool and ``tuple[...]`` of those (written as a comma-separated list on the command line). One field may be made
with ``nested``: groups by name, whose settings become ``--train.<name>.<field>``. A setting that several groups have in
common, such as the seed of all causal tests, is *shared*: one flag, ``--causal.seed``, gives its value to all of them.
A field that is not made with ``setting``, or with ``is_flag=False``, is no flag: code alone sets it. ``Place`` and
``Text`` are kinds of str.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeVar

from saejax import results
from saejax.errors import UserError

#: The type of a setting that results depend on and that can name a file or folder.
Place = Annotated[str, "place"]
#: The type of a setting that holds a text, in which any sign may stand.
Text = Annotated[str, "text"]


def setting(
    default: Any,
    help: str,
    *,
    low=None,
    high=None,
    choices: Sequence[Any] | Callable[[], Sequence[Any]] | None = None,
    changes_results: bool = True,
    swept: bool = False,
    order: Sequence[str] | None = None,
    shared: str = "",
    is_flag: bool = True,
) -> Any:
    """Declare a dataclass field that is checked, and becomes a flag.

    Args:
      default: the value when the flag is not given.
      help: its effect, with its unit.
      low: smallest allowed value, inclusive (of each element, for a tuple).
      high: largest allowed value, inclusive.
      choices: the allowed values, or a function that gives them.
      changes_results: False for what only affects speed, logging or which units there are; such a field does not
        make a finished unit run again.
      swept: whether several values make as many members of a stack.
      order: of a tuple of names that are a set: the names are kept once each, in this order, others after these by the
        alphabet, so that another order on the command line makes nothing again. None: the order counts.
      shared: prefix of the flag that sets this field in every group that shares it, with one default and help; empty:
        the group's name, for a flag of the group alone.
      is_flag: False for what nobody changes on a command line: Python alone sets it, and no unit counts it.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, changes_results=changes_results)
    return dataclasses.field(
        default=default, metadata=metadata | dict(swept=swept, order=order, shared=shared, is_flag=is_flag)
    )


def nested(groups: Callable[[], Mapping[str, type["Config"]]]) -> Any:
    """Declare a dataclass field of groups by name, dict[str, Config].

    Args:
      groups: returns the classes by name.
    """
    return dataclasses.field(default_factory=dict, metadata=dict(nested=groups))


@dataclasses.dataclass(frozen=True)
class Config:
    """Base class of the groups: checks ranges and choices when it is made. Subclasses are frozen dataclasses."""

    def __post_init__(self):
        for field in (field for field in dataclasses.fields(self) if "help" in field.metadata):
            value = getattr(self, field.name)
            if field.metadata["swept"] and not value:
                raise UserError(f"{field.name} is empty: name a value, or several")
            for item in value if isinstance(value, tuple) else (value,):
                _check(field, item)
            if (order := field.metadata["order"]) is not None:
                listed = [name for name in order if name in value]
                object.__setattr__(self, field.name, (*listed, *sorted({*value} - {*listed})))


C = TypeVar("C", bound=Config)


class Configs:
    """The groups of a run, each found by its class: ``configs[TrainConfig].batch``.

    Args:
      groups: at most one of each class.
    """

    def __init__(self, *groups: Config):
        self._groups = {type(group): group for group in groups}

    def __getitem__(self, group: type[C]) -> C:
        return typing.cast(C, self._groups[group])

    def get(self, group: type[C]) -> C | None:
        """Return the group of a class; None where there is none."""
        return typing.cast(C | None, self._groups.get(group))

    def __iter__(self) -> Iterator[Config]:
        return iter(self._groups.values())

    def __or__(self, group: Config) -> "Configs":
        """Return a copy with this group in place of the one of its class."""
        return Configs(*{**self._groups, type(group): group}.values())

    def named(self, name: str) -> Any:
        """Return the group with a name such as "train"."""
        return {group_name(cls): group for cls, group in self._groups.items()}[name]


def own_settings(cls: type) -> dict[str, dataclasses.Field]:
    """Return the settings of the group itself that flags set; a plain field is set by code alone."""
    return {field.name: field for field in dataclasses.fields(cls) if field.metadata.get("is_flag")}


def nested_groups(cls: type) -> Iterator[tuple[str, str, type[Config]]]:
    """Return the groups inside a group: the field that holds them, their name and class."""
    for field in dataclasses.fields(cls):
        for name, group in field.metadata.get("nested", dict)().items():
            yield field.name, name, group


def _check(field: dataclasses.Field, value: Any) -> None:
    if value is None:  # an optional field
        return
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field.name} is {'NaN' if math.isnan(value) else value}: expected a finite number")
    if low is not None and value < low:
        raise UserError(f"{field.name} is {value}: expected at least {low}")
    if high is not None and value > high:
        raise UserError(f"{field.name} is {value}: expected at most {high}")
    # Kinds of plugins are known only when a value is checked.
    listed = choices() if callable(choices) else choices
    if listed is not None and value not in listed:
        more = "; --plugins=FILE adds others (in Python, import the file)" if callable(choices) else ""
        raise UserError(f"{field.name} is {value!r}: expected one of {', '.join(map(str, listed))}{more}")


def group_name(group: type) -> str:
    """Return the name of a group, which is the prefix of its flags: "train" for ``TrainConfig``."""
    return group.__name__.removesuffix("Config").lower()


def to_json(config: Any) -> dict[str, Any]:
    """Return the group as plain JSON data; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def is_of(field: dataclasses.Field, kind: Any) -> bool:
    """Return whether a setting, or each element of its tuple, is of a kind: ``Place`` or ``Text``."""
    return kind in (field.type, *typing.get_args(field.type))


def counted(*configs: Config, but: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of groups that results may depend on, flagless ones included, as JSON data by "group.field".

    A folder is named in one way: "DIR/" and "./DIR" are "DIR".

    Args:
      configs: the groups; a setting of a group inside of one is "group.inner.field".
      but: names of settings to leave out.
    """
    values: dict[str, Any] = {}
    for config in configs:
        label = group_name(type(config))
        groups = {label: config}
        for field, name, inner in nested_groups(type(config)):
            groups[f"{label}.{name}"] = getattr(config, field).get(name) or inner()
        for prefix, group in groups.items():
            data = to_json(group)
            for f in dataclasses.fields(group):
                if "nested" not in f.metadata and f.metadata.get("changes_results", True):
                    values[f"{prefix}.{f.name}"] = _in_one_way(data[f.name]) if is_of(f, Place) else data[f.name]
    return {name: value for name, value in values.items() if name not in but}


def _in_one_way(places: Any) -> Any:
    """Return the name of a file or folder, or a list of names, without "./" and slashes that say nothing."""
    if isinstance(places, list):
        return [_in_one_way(place) for place in places]
    is_path = places and "://" not in places
    return str(PurePath(places)) if is_path else places


def from_json(cls: type[C], data: Any, source: str | Path, field: str = "") -> C:
    """Return the group that ``to_json`` wrote, with defaults for fields that came since.

    Args:
      cls: its class.
      data: the JSON data.
      source: the file that it was read from, for messages.
      field: its position in the file, for messages.

    Raises:
      UserError: a field is of another type or out of range, or unknown: its meaning would be ignored. Another version
        wrote it: a newer one, or an older one whose field has gone since.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{source} has {data!r:.60} in {field or 'it'}, expected the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(hints)):
        raise UserError(
            f"{cls.__name__} in {source}: fields {unknown} are unknown: an older or a newer version of saejax wrote it"
        )
    inside = f"{field}." if field else ""
    values = {name: results.from_json(hints[name], value, source, f"{inside}{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{source}: {inside}{error}") from None

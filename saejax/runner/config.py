"""Configuration: frozen dataclasses that validate themselves, and the flags made from them.

A *group* is one frozen dataclass, such as ``TrainConfig``, whose name is that of the class, ``train``. Each of
its fields is made with ``setting`` and becomes the flag ``--train.<field>``. Field types are str, int,
float, bool and ``tuple[...]`` of those (written as a comma-separated list on the command line). One field may be made
with ``nested``: groups by name, whose settings become ``--train.<name>.<field>``. A setting that several groups have in
common, such as the seed of all causal tests, is *shared*: one flag, ``--causal.seed``, gives its value to all of them.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags

from saejax.errors import UserError


def setting(
    default: Any,
    help: str,
    *,
    low=None,
    high=None,
    choices: Sequence[Any] | Callable[[], Sequence[Any]] | None = None,
    changes_results: bool = True,
    only: tuple[str, ...] | Callable[[str], bool] = (),
    swept: bool = False,
    shared: str = "",
) -> Any:
    """Declare a dataclass field that becomes a flag.

    Args:
      default: the value when the flag is not given.
      help: what it does, with its unit.
      low: smallest allowed value, inclusive (of each element, for a tuple).
      high: largest allowed value, inclusive.
      choices: the allowed values, or a function that gives them.
      changes_results: False for what only affects speed, logging or which units there are; such a field does not
        make a finished unit run again.
      only: names of the units whose results it changes, such as ("gsm8k",), or a test of the name; empty: of all.
      swept: whether several values make as many members of a stack.
      shared: prefix of the flag that sets this field in every group that shares it, with one default and help; empty:
        the group's name, for a flag of the group alone.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, changes_results=changes_results, only=only)
    return dataclasses.field(default=default, metadata=metadata | dict(swept=swept, shared=shared))


def nested(groups: Callable[[], Mapping[str, type["Config"]]]) -> Any:
    """Declare a dataclass field of groups by name, dict[str, Config]; a unit depends only on the group of its own name.

    Args:
      groups: returns the classes by name.
    """
    return dataclasses.field(default_factory=dict, metadata=dict(nested=groups))


@dataclasses.dataclass(frozen=True)
class Config:
    """Base class of the groups: checks ranges and choices when it is made. Subclasses are frozen dataclasses."""

    def __post_init__(self):
        for field in _settings(type(self)).values():
            value = getattr(self, field.name)
            if field.metadata["swept"] and not value:
                raise UserError(f"{field.name} is empty: name a value, or several")
            for item in value if isinstance(value, tuple) else (value,):
                _check(field, item)

    def also(self, unit: str) -> dict[str, Any]:
        """Return what the results of the named unit depend on besides settings, as JSON data."""
        return {}


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


def _settings(cls: type) -> dict[str, dataclasses.Field]:
    """Return the fields that are settings of the group itself."""
    return {field.name: field for field in dataclasses.fields(cls) if "nested" not in field.metadata}


def _nested(cls: type) -> Iterator[tuple[str, str, type[Config]]]:
    """Return the groups inside a group: the field that holds them, their name and class."""
    for field in dataclasses.fields(cls):
        for name, group in field.metadata.get("nested", dict)().items():
            yield field.name, name, group


def flag_name(group: str, field: dataclasses.Field) -> str:
    """Return the name of the flag of a setting of a group."""
    return f"{field.metadata['shared'] or group}.{field.name}"


def flag_fields(group: str, cls: type) -> dict[str, dataclasses.Field]:
    """Return the settings of a group and of those inside it, by the names of their flags."""
    fields = {flag_name(group, field): field for field in _settings(cls).values()}
    for _, name, inner in _nested(cls):
        fields |= {f"{group}.{name}.{key}": field for key, field in _settings(inner).items()}
    return fields


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
    choices = choices() if callable(choices) else choices
    if choices is not None and value not in choices:
        raise UserError(f"{field.name} is {value!r}: expected one of {', '.join(map(str, choices))}")


def group_name(group: type) -> str:
    """Return the name of a group, which is the prefix of its flags: "train" for ``TrainConfig``."""
    return group.__name__.removesuffix("Config").lower()


def to_json(config: Any) -> dict[str, Any]:
    """Return the group as plain JSON data; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def identity(config: Any, unit: str = "") -> dict[str, Any]:
    """Return the part of ``to_json`` that the results of the named unit depend on, its own nested group included."""
    inside = [getattr(config, field).get(name, inner()) for field, name, inner in _nested(type(config)) if name == unit]
    values = config.also(unit)
    for group in (config, *inside):
        data = to_json(group)
        values |= {name: data[name] for name, field in _settings(type(group)).items() if _changes_results(field, unit)}
    return values


def _changes_results(field: dataclasses.Field, unit: str) -> bool:
    only = field.metadata["only"]
    return field.metadata["changes_results"] and (only(unit) if callable(only) else not only or unit in only)


def from_json(cls: type, data: Mapping[str, Any]) -> Any:
    """Return the group that ``to_json`` wrote. Unknown and missing fields are a ``UserError``."""
    hints = typing.get_type_hints(cls)
    unknown = set(data) ^ set(hints)
    if unknown:
        raise UserError(f"{cls.__name__} in a saved file: fields {sorted(unknown)} are unknown or missing")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def define_flags(groups: Mapping[str, type], flag_values: flags.FlagValues) -> None:
    """Define ``--group.field`` for every field of every group, on ``flag_values``."""
    for group, cls in groups.items():
        _define_all(group, cls, flag_values)
        for _, name, inner in _nested(cls):
            _define_all(f"{group}.{name}", inner, flag_values)


def _define_all(group: str, cls: type, flag_values: flags.FlagValues) -> None:
    hints = typing.get_type_hints(cls)
    for name, field in _settings(cls).items():
        default, flag = typing.cast(Any, field.default), flag_name(group, field)
        if field.metadata["shared"] and flag in flag_values:  # another group has defined it
            if (flag_values[flag].default, flag_values[flag].help) != (default, field.metadata["help"]):
                raise ValueError(f"--{flag} has another default or help in the group {group}")
            continue
        _define(flag, hints[name], default, field.metadata["help"], flag_values)


def _define(name: str, hint: Any, default: Any, help_text: str, flag_values: flags.FlagValues) -> None:
    parsers: dict[Any, tuple[flags.ArgumentParser, flags.ArgumentSerializer]] = {
        str: (flags.ArgumentParser(), flags.ArgumentSerializer()),
        int: (_IntParser(), flags.ArgumentSerializer()),
        float: (_FloatParser(), flags.ArgumentSerializer()),
    }
    if hint is bool:
        flags.DEFINE_bool(name, default, help_text, flag_values=flag_values)
    elif isinstance(hint, types.GenericAlias):
        parser: flags.ArgumentParser = _TupleParser(parsers[typing.get_args(hint)[0]][0])
        flags.DEFINE(parser, name, default, help_text, flag_values, flags.CsvListSerializer(","))
    else:
        parser, serializer = parsers[hint]
        flags.DEFINE(parser, name, default, help_text, flag_values, serializer)


class _PlainErrors:
    """Mixin of absl's parsers of numbers, whose own message is Python's."""

    expected: str

    def convert(self, argument: Any) -> Any:
        try:
            return super().convert(argument)  # type: ignore[misc]
        except ValueError:
            raise ValueError(f"{argument!r} is not {self.expected}") from None


class _IntParser(_PlainErrors, flags.IntegerParser):
    expected = "a whole number"


class _FloatParser(_PlainErrors, flags.FloatParser):
    expected = "a number"


class _TupleParser(flags.ArgumentParser):
    """Parser of "a,b,c" by the element's own parser; the empty string is the empty tuple."""

    syntactic_help = "a comma separated list"

    def __init__(self, element: flags.ArgumentParser):
        self._element = element

    def parse(self, argument: Any) -> tuple:
        items = argument.split(",") if isinstance(argument, str) else argument
        return tuple(
            self._element.parse(item.strip() if isinstance(item, str) else item) for item in items if item != ""
        )

    def flag_type(self) -> str:
        return f"comma separated list of {self._element.flag_type()}"


def from_flags(
    groups: Mapping[str, type], flag_values: flags.FlagValues, accepted: Collection[str] | None = None
) -> Configs:
    """Build every group from parsed flags.

    Args:
      groups: the classes by name.
      flag_values: the parsed flags.
      accepted: names of the groups whose flags count; the others have their defaults. None: all.

    Raises:
      UserError: a value is out of range; the message names the flag.
    """
    configs = []
    for group, cls in groups.items():
        if accepted is not None and group not in accepted:
            configs.append(cls())
            continue
        inside: dict[str, dict[str, Config]] = {}
        for field, name, inner in _nested(cls):
            inside.setdefault(field, {})[name] = _from_flags(f"{group}.{name}", inner, flag_values)
        configs.append(_from_flags(group, cls, flag_values, inside))
    return Configs(*configs)


def _from_flags(group: str, cls: type, flag_values: flags.FlagValues, inside: Mapping[str, Any] | None = None) -> Any:
    fields = _settings(cls)
    values = {name: flag_values[flag_name(group, field)].value for name, field in fields.items()}
    try:
        return cls(**values, **inside or {})
    except UserError as error:
        name, _, rest = str(error).partition(" ")  # the message begins with the field's name
        flag = flag_name(group, fields[name]) if name in fields else f"{group}.{name}"
        raise UserError(f"--{flag} {rest}") from None

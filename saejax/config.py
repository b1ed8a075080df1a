"""Configuration: frozen dataclasses that validate themselves, and the flags made from them.

A *group* is one frozen dataclass, such as ``TrainConfig``, whose name is that of the class, ``train``. Each of
its fields is made with ``setting`` and becomes the flag ``--train.<field>``. Field types are str, int,
float, bool and ``tuple[...]`` of those (written as a comma-separated list on the command line).
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from absl import flags

from saejax.errors import UserError


def setting(
    default: Any,
    help: str,
    *,
    low=None,
    high=None,
    choices=None,
    changes_results: bool = True,
    only: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that becomes a flag.

    Args:
      default: the value when the flag is not given.
      help: what it does, with its unit.
      low: smallest allowed value, inclusive (of each element, for a tuple).
      high: largest allowed value, inclusive.
      choices: the allowed values.
      changes_results: False for what only affects speed, logging or which units there are; such a field does not
        make a finished unit run again.
      only: names of the units whose results it changes, such as ("topk",); empty: of all.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, changes_results=changes_results, only=only)
    return dataclasses.field(default=default, metadata=metadata)


class Config:
    """Base of the groups: checks ranges and choices when it is made. Subclasses are frozen dataclasses."""

    def __post_init__(self):
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                _check(field, item)


def _check(field: dataclasses.Field, value: Any) -> None:
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    if isinstance(value, float) and value != value:
        raise UserError(f"{field.name} is NaN: expected a number")
    if low is not None and value < low:
        raise UserError(f"{field.name} is {value}: expected at least {low}")
    if high is not None and value > high:
        raise UserError(f"{field.name} is {value}: expected at most {high}")
    if choices is not None and value not in choices:
        raise UserError(f"{field.name} is {value!r}: expected one of {', '.join(map(str, choices))}")


def group_name(group: type) -> str:
    """The name of a group, and of its flags: "train" of ``TrainConfig``."""
    return group.__name__.removesuffix("Config").lower()


def to_json(config: Any) -> dict[str, Any]:
    """The group as plain JSON data; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def identity(config: Any, unit: str = "") -> dict[str, Any]:
    """The part of ``to_json`` that the results of the unit of this name depend on."""
    return {
        field.name: to_json(config)[field.name]
        for field in dataclasses.fields(config)
        if field.metadata["changes_results"] and (not field.metadata["only"] or unit in field.metadata["only"])
    }


def from_json(cls: type, data: Mapping[str, Any]) -> Any:
    """The group that ``to_json`` wrote. Unknown and missing fields are a ``UserError``."""
    hints = typing.get_type_hints(cls)
    unknown = set(data) ^ set(hints)
    if unknown:
        raise UserError(f"{cls.__name__} in a saved file: fields {sorted(unknown)} are unknown or missing")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def define_flags(groups: Mapping[str, type], flag_values: flags.FlagValues) -> None:
    """Defines ``--group.field`` for every field of every group, on ``flag_values``."""
    for group, cls in groups.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _define(f"{group}.{field.name}", hints[field.name], field, flag_values)


def _define(name: str, hint: Any, field: dataclasses.Field, flag_values: flags.FlagValues) -> None:
    parsers: dict[Any, tuple[flags.ArgumentParser, flags.ArgumentSerializer]] = {
        str: (flags.ArgumentParser(), flags.ArgumentSerializer()),
        int: (flags.IntegerParser(), flags.ArgumentSerializer()),
        float: (flags.FloatParser(), flags.ArgumentSerializer()),
    }
    help_text, default = field.metadata["help"], typing.cast(Any, field.default)
    if hint is bool:
        flags.DEFINE_bool(name, default, help_text, flag_values=flag_values)
    elif isinstance(hint, types.GenericAlias):
        parser: flags.ArgumentParser = _TupleParser(parsers[typing.get_args(hint)[0]][0])
        flags.DEFINE(parser, name, default, help_text, flag_values, flags.CsvListSerializer(","))
    else:
        parser, serializer = parsers[hint]
        flags.DEFINE(parser, name, default, help_text, flag_values, serializer)


class _TupleParser(flags.ArgumentParser):
    """Parses "a,b,c" with the element's own parser; the empty string is the empty tuple."""

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


def from_flags(groups: Mapping[str, type], flag_values: flags.FlagValues) -> dict[str, Any]:
    """Builds every group from parsed flags.

    Raises:
      UserError: a value is out of range; the message names the flag.
    """
    configs = {}
    for group, cls in groups.items():
        values = {f.name: flag_values[f"{group}.{f.name}"].value for f in dataclasses.fields(cls)}
        try:
            configs[group] = cls(**values)
        except UserError as error:
            raise UserError(f"--{group}.{error}") from None
    return configs

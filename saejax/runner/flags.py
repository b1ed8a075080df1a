"""Flags made from groups of configuration (``saejax.config``), and groups filled from parsed flags."""

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from absl import flags

from saejax.config import Config, Configs, nested_groups, own_settings
from saejax.errors import UserError


def flag_name(group: str, field: dataclasses.Field) -> str:
    """Return the name of the flag of a setting of a group."""
    return f"{field.metadata['shared'] or group}.{field.name}"


def flag_fields(group: str, cls: type) -> dict[str, dataclasses.Field]:
    """Return the settings of a group and of those inside it, by the names of their flags."""
    fields = {flag_name(group, field): field for field in own_settings(cls).values()}
    for _, name, inner in nested_groups(cls):
        fields |= {f"{group}.{name}.{key}": field for key, field in own_settings(inner).items()}
    return fields


def define_flags(groups: Mapping[str, type], flag_values: flags.FlagValues) -> None:
    """Define ``--group.field`` for every field of every group, on ``flag_values``."""
    for group, cls in groups.items():
        _define_all(group, cls, flag_values)
        for _, name, inner in nested_groups(cls):
            _define_all(f"{group}.{name}", inner, flag_values)


def _define_all(group: str, cls: type, flag_values: flags.FlagValues) -> None:
    hints = typing.get_type_hints(cls)
    for name, field in own_settings(cls).items():
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
        for field, name, inner in nested_groups(cls):
            inside.setdefault(field, {})[name] = _from_flags(f"{group}.{name}", inner, flag_values)
        configs.append(_from_flags(group, cls, flag_values, inside))
    return Configs(*configs)


def _from_flags(group: str, cls: type, flag_values: flags.FlagValues, inside: Mapping[str, Any] | None = None) -> Any:
    fields = own_settings(cls)
    values = {name: flag_values[flag_name(group, field)].value for name, field in fields.items()}
    try:
        return cls(**values, **inside or {})
    except UserError as error:
        name, _, rest = str(error).partition(" ")  # the message begins with the field's name
        flag = flag_name(group, fields[name]) if name in fields else f"{group}.{name}"
        raise UserError(f"--{flag} {rest}") from None

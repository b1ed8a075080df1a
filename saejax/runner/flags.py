"""Flags made from groups of configuration (``saejax.config``), and groups filled from parsed flags."""

import dataclasses
import itertools
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
    return {
        flag_name(prefix, field): field
        for prefix, inner in _groups_of(group, cls)
        for field in own_settings(inner).values()
    }


def _groups_of(group: str, cls: type) -> list[tuple[str, type]]:
    """Return a group and those inside it, by the prefixes of their flags."""
    return [(group, cls), *((f"{group}.{name}", inner) for _, name, inner in nested_groups(cls))]


def define_flags(groups: Mapping[str, type], flag_values: flags.FlagValues) -> None:
    """Define ``--group.field`` for every field of every group, on ``flag_values``."""
    for prefix, cls in itertools.chain.from_iterable(itertools.starmap(_groups_of, groups.items())):
        hints = typing.get_type_hints(cls)
        for name, field in own_settings(cls).items():
            default, flag, help_text = field.default, flag_name(prefix, field), field.metadata["help"]
            if not field.metadata["shared"] or flag not in flag_values:
                _define(flag, hints[name], default, help_text, flag_values)
            elif (flag_values[flag].default, flag_values[flag].help) != (default, help_text):  # of another group
                raise ValueError(f"--{flag} has another default or help in the group {prefix}")


def _define(name: str, hint: Any, default: Any, help_text: str, flag_values: flags.FlagValues) -> None:
    parsers: dict[Any, flags.ArgumentParser] = {
        str: flags.ArgumentParser(),
        int: flags.IntegerParser(),
        float: flags.FloatParser(),
    }
    if hint is bool:
        flags.DEFINE_bool(name, default, help_text, flag_values=flag_values)
    elif isinstance(hint, types.GenericAlias):
        flags.DEFINE(_TupleParser(parsers[typing.get_args(hint)[0]]), name, default, help_text, flag_values)
    else:
        flags.DEFINE(parsers[hint], name, default, help_text, flag_values)


class _TupleParser(flags.ArgumentParser):
    """Parser of "a,b,c" by the element's own parser; the empty string is the empty tuple."""

    syntactic_help = "a comma separated list"

    def __init__(self, element: flags.ArgumentParser):
        self._element = element

    def parse(self, argument: Any) -> tuple:
        items = argument.split(",") if isinstance(argument, str) else argument
        items = [item.strip() if isinstance(item, str) else item for item in items]
        return tuple(self._element.parse(item) for item in items if item != "")


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

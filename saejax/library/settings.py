"""Settings as a function's keywords."""

import dataclasses
import typing
from typing import Any, TypeVar

from saejax.config import Config
from saejax.errors import one_of

ConfigT = TypeVar("ConfigT", bound=Config)


def configured(cls: type[ConfigT], unit: str = "", **settings: Any) -> ConfigT:
    """A group of settings; a value in place of a list makes a list of one.

    Args:
      cls: the group.
      unit: the unit whose own settings, those of a group nested in this one, may be given too, such as "jumprelu".
      **settings: the values, by name.

    Raises:
      UserError: a setting is unknown or out of range.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        own = field.metadata.get("nested", dict)().get(unit)
        names = set(typing.get_type_hints(own)) - set(hints) if own else set()
        if inside := {name: settings.pop(name) for name in names & set(settings)}:
            values[field.name] = {unit: configured(own, **inside)}
    for name, value in settings.items():
        one_of(name, hints, f"setting of {cls.__name__}")
        takes_list = typing.get_origin(hints[name]) is tuple
        listed = value if isinstance(value, tuple | list) else (value,)
        values[name] = tuple(listed) if takes_list else value
    return cls(**values)

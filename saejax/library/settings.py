"""Settings as a function's keywords."""

import typing
from typing import Any, TypeVar

from saejax.config import Config
from saejax.errors import one_of

ConfigT = TypeVar("ConfigT", bound=Config)


def configured(cls: type[ConfigT], **settings: Any) -> ConfigT:
    """A group of settings; a value in place of a list makes a list of one.

    Raises:
      UserError: a setting is unknown or out of range.
    """
    hints = typing.get_type_hints(cls)
    for name in settings:
        one_of(name, hints, f"setting of {cls.__name__}")
    lists = {name for name, hint in hints.items() if typing.get_origin(hint) is tuple}
    as_given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return cls(
        **{
            name: (value,) if name in lists and not isinstance(value, tuple) else value
            for name, value in as_given.items()
        }
    )

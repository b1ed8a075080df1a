"""What settings know of the kinds of dictionary: their names, which settings each reads, and settings of their own.

The kinds are classes of ``dictionaries.kinds``, which stands above the settings and is imported when it is first asked.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from saejax.config import Config


def kinds() -> Mapping[str, Any]:
    """All kinds by name, those of ``--plugins`` among them."""
    return importlib.import_module("saejax.dictionaries.kinds").KINDS


def kind_names() -> tuple[str, ...]:
    """The names of all kinds."""
    return tuple(kinds())


def settings_of_kinds() -> dict[str, type[Config]]:
    """The classes of the settings that one kind alone has, by its name."""
    return {name: kind.Settings for name, kind in kinds().items()}


def read_by_kind(setting: str) -> Callable[[str], bool]:
    """A test of a unit's name: whether it is that of a kind that reads a setting which not all kinds read."""
    return lambda unit: unit in kinds() and setting in kinds()[unit].reads

"""The kinds of dictionary, a file each, and their registry; ``docs/extending.md`` says how to add one."""

from typing import TypeVar

from saejax.config import Config
from saejax.dictionaries.kinds.base import EncoderInputs as EncoderInputs
from saejax.dictionaries.kinds.base import Kind as Kind
from saejax.dictionaries.kinds.batchtopk import BatchTopK
from saejax.dictionaries.kinds.gated import Gated
from saejax.dictionaries.kinds.jumprelu import JumpReLU
from saejax.dictionaries.kinds.linear import Linear
from saejax.dictionaries.kinds.matching_pursuit import MatchingPursuit
from saejax.dictionaries.kinds.matryoshka import Matryoshka
from saejax.dictionaries.kinds.standard import Standard
from saejax.dictionaries.kinds.topk import TopK
from saejax.errors import one_of

PRETRAINED = "pretrained"  # in the place of a kind: dictionaries that were not trained here

_Class = TypeVar("_Class", bound=type[Kind])
_PACKAGE = (Standard, Linear, Gated, JumpReLU, TopK, BatchTopK, Matryoshka, MatchingPursuit)
KINDS: dict[str, Kind] = {kind.name: kind() for kind in _PACKAGE}


def register(kind: _Class) -> _Class:
    """Register a kind, or replace one of a plugin; a decorator of its class.

    Raises:
      ValueError: the name belongs to a kind of this package, or is no word.
    """
    if kind.name in {PRETRAINED, *(module.name for module in _PACKAGE)} or not kind.name.replace("_", "").isalnum():
        raise ValueError(f"a kind cannot be called {kind.name!r}: expected a word, and none of the package's own kinds")
    KINDS[kind.name] = kind()
    return kind


def by_name(name: str) -> Kind:
    """Return the kind of a name.

    Raises:
      UserError: there is none; the message lists all.
    """
    return KINDS[one_of(name, KINDS, "kind of dictionary (--plugins=FILE adds others)")]


def kind_names() -> tuple[str, ...]:
    """Return the names of all kinds, with the kinds of ``--plugins``."""
    return tuple(KINDS)


def unit_names() -> tuple[str, ...]:
    """Return the names of train units: all kinds, and the dictionaries that were trained elsewhere."""
    return (*KINDS, PRETRAINED)


def settings_of_kinds() -> dict[str, type[Config]]:
    """Return, by kind, the class of the settings that only this kind has."""
    return {name: kind.Settings for name, kind in KINDS.items()}

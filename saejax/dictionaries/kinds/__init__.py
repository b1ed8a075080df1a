"""The kinds of dictionary, a file each, and their registry; ``docs/extending.md`` says how to add one."""

from typing import TypeVar

from saejax.dictionaries.kinds.base import EncoderInputs as EncoderInputs
from saejax.dictionaries.kinds.base import Kind as Kind
from saejax.dictionaries.kinds.batchtopk import BatchTopK
from saejax.dictionaries.kinds.gated import Gated
from saejax.dictionaries.kinds.jumprelu import JumpReLU
from saejax.dictionaries.kinds.linear import Linear
from saejax.dictionaries.kinds.matching_pursuit import MatchingPursuit
from saejax.dictionaries.kinds.matryoshka import Matryoshka
from saejax.dictionaries.kinds.settings import KIND_SETTINGS, PRETRAINED, KindSettings
from saejax.dictionaries.kinds.standard import Standard
from saejax.dictionaries.kinds.topk import TopK
from saejax.errors import one_of

_Class = TypeVar("_Class", bound=type[Kind])
_PACKAGE = (Standard, Linear, Gated, JumpReLU, TopK, BatchTopK, Matryoshka, MatchingPursuit)
KINDS: dict[str, Kind] = {kind.name: kind() for kind in _PACKAGE}


def register(kind: _Class) -> _Class:
    """Register a kind and its settings, or replace one of a plugin; a decorator of its class.

    Raises:
      ValueError: the name belongs to a kind of this package, or is no word.
    """
    if kind.name in {PRETRAINED, *(each.name for each in _PACKAGE)} or not kind.name.replace("_", "").isalnum():
        raise ValueError(f"a kind cannot be called {kind.name!r}: expected a word, and none of the package's own kinds")
    KIND_SETTINGS[kind.name] = KindSettings(kind.Settings, tuple(kind.reads))
    KINDS[kind.name] = kind()
    return kind


def by_name(name: str) -> Kind:
    """Return the kind of a name.

    Raises:
      UserError: there is none; the message lists all.
    """
    return KINDS[one_of(name, KINDS, "kind of dictionary (--plugins=FILE adds others)")]
